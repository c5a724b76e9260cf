"""Why training broke down, in words."""

from typing import Any

import pyro
import torch
from pyro.poutine.util import site_is_subsample

from stochdyn.inference.objective import AbstractObjective, Program
from stochdyn.inference.parameters import Parameters
from stochdyn.inference.scopes import unvalidated

_FIX = (
    "Fix: a lower lr, tighter priors, a smaller dt, or data on the scale that the model expects (divide them "
    "by their standard deviation). `error.fit` holds the last good state."
)


def bad_sites(model: Program, guide: Program, args: tuple) -> list[str]:
    """The sample sites whose value or log-probability is not finite, in one fresh run.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        >>> bad_sites(model, lambda y: None, (torch.tensor(1e30),))
        ["model site 'y' (observed, largest |value| 1e+30)"]
    """
    with torch.no_grad(), unvalidated():
        guide_trace, guide_error = _run(guide, args)
        model_trace, model_error = _run(pyro.poutine.replay(model, trace=guide_trace), args)
    found = [text for text in (guide_error and f"guide: {guide_error}", model_error) if text]
    for role, trace in (("guide", guide_trace), ("model", model_trace)):
        sites = [(name, site) for name, site in trace.nodes.items() if site["type"] == "sample"]
        found += [f"{role} site {_describe(name, site)}" for name, site in sites if not _finite(site)]
    return found


def breakdown(
    parameters: Parameters, objective: AbstractObjective, model: Program, guide: Program, args: tuple
) -> str:
    """What is not finite in one fresh run of the objective: sites, gradients, parameters; and the fix.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from stochdyn.inference import ELBO
        >>> def model(y):
        ...     pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        >>> guide = lambda y: None
        >>> text = breakdown(Parameters({}), ELBO(), model, guide, (torch.tensor(1e30),))
        >>> print(text.splitlines()[0])
        Not finite in a fresh run: model site 'y' (observed, largest |value| 1e+30).
    """
    sites = bad_sites(model, guide, args)
    gradients = _bad_gradients(parameters, objective, model, guide, args)
    values = [name for name, tensor in parameters.named().items() if not _all_finite(tensor)]
    lines = [
        f"Not finite in a fresh run: {'; '.join(sites) or 'no sample site'}.",
        f"Parameters with a non-finite gradient: {', '.join(gradients) or 'none'}; "
        f"with a non-finite value: {', '.join(values) or 'none'}.",
        _FIX,
    ]
    return "\n".join(lines)


def _run(program: Program, args: tuple) -> tuple[Any, str]:
    """The trace as far as the program came, and the error that ended it."""
    error = ""
    with pyro.poutine.trace() as messenger:
        try:
            program(*args)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return messenger.get_trace(), error


def _describe(name: str, site: dict) -> str:
    if not site["is_observed"] or not isinstance(site["value"], torch.Tensor):
        return repr(name)
    return f"{name!r} (observed, largest |value| {site['value'].abs().max().item():.3g})"


def _finite(site: dict) -> bool:
    if site_is_subsample(site):
        return True
    try:
        with torch.no_grad(), unvalidated():
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except Exception:
        return False
    return _all_finite(log_prob) and _all_finite(site["value"])


def _bad_gradients(
    parameters: Parameters, objective: AbstractObjective, model: Program, guide: Program, args: tuple
) -> list[str]:
    parameters.clear_gradients()
    try:
        with unvalidated():
            objective.loss(model, guide, *args).backward()
    except Exception:
        return []  # the same error is reported with the sites
    named = parameters.named().items()
    bad = [name for name, tensor in named if tensor.grad is not None and not _all_finite(tensor.grad)]
    parameters.clear_gradients()
    return bad


def _all_finite(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or bool(torch.isfinite(value).all())
