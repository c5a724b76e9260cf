"""The importance-weighted bound, with weights per series and doubly reparametrised gradients."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from torch import Tensor

from stochdyn.errors import FitError
from stochdyn.inference.estimators import check_dimensions
from stochdyn.inference.local import Layout, Units, find_layout, scored
from stochdyn.inference.objective import AbstractObjective, Program
from stochdyn.inference.parameters import guide_parameters, leaves, modules_of, save_buffers


@dataclass(frozen=True)
class IWAE(AbstractObjective):
    """The importance-weighted bound of the evidence, as a loss (its negative); weights are per series.

    bound = E[ log p/q(global) + scale * sum_i log 1/K sum_k w_ik ],  w_ik = p(y_i, z_ik) / q(z_ik)

    Latents outside the series' plate are drawn once, those inside it K times, all at once; `scale` is
    population / batch size. With K = 1 it is the ELBO; it grows with K, towards the evidence where all latents
    are local. The weights of different series never multiply, so a larger batch costs nothing.

    Args:
        particles: K. 5 to 50; time and memory grow with it.
        plate: The name of the plate whose members are weighed apart; None finds the one over the series, around
            every observed site. A program without plates has one weight for all.
        doubly_reparametrised: Gradients of the guide's own parameters run through the drawn values only,
            weighted by the squared normalised weights. The plain gradient's signal-to-noise ratio falls with
            the number of particles, this one's does not. It runs the guide twice. Parameters that the model
            has too (a guided path contains its prior's drift) keep the plain gradient.
        layout: Filled in by `prepared`.

    Raises:
        FitError: fewer than one particle. While fitting: no or several candidate plates, a latent without
            `rsample`, a latent that only one of the two programs has, a latent outside the plate that depends on
            one inside, or a KL weight other than 1.

    References:
        Burda, Grosse & Salakhutdinov, "Importance weighted autoencoders", 2016,
        https://arxiv.org/abs/1509.00519; Rainforth et al., "Tighter variational bounds are not necessarily
        better", 2018, https://arxiv.org/abs/1802.04537; Tucker et al., "Doubly reparameterized gradient
        estimators for Monte Carlo objectives", 2018, https://arxiv.org/abs/1810.04152

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import stochdyn as sd
        >>> def model(y):
        ...     with pyro.plate("rows", len(y)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def guide(y):
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> loss = sd.IWAE(particles=20000).loss(model, guide, torch.tensor([1.0, 2.0]))
        >>> round(loss.item(), 1)  # -log N(1; 0, 2) - log N(2; 0, 2) = 3.78
        3.8
    """

    particles: int = 10
    plate: str | None = None
    doubly_reparametrised: bool = True
    layout: Layout | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.particles < 1:
            raise FitError(f"IWAE: particles must be at least 1, got {self.particles}. The default is 10.")

    def check_weight(self, weight: float) -> None:
        if weight != 1.0:
            raise FitError(
                f"IWAE: a KL weight of {weight:g} has no meaning for it, since its weights are ratios of whole "
                "densities. Use kl_weight=1.0, or objective=ELBO() for a warm-up."
            )

    def prepared(self, model: Program, guide: Program, *args: Any) -> Self:
        if self.layout is not None:
            return self
        return replace(self, layout=find_layout(model, guide, args, self.plate))

    def loss(self, model: Program, guide: Program, *args: Any) -> Tensor:
        layout = self.prepared(model, guide, *args).layout or Layout(None, 0)
        gates = _Gates(layout)
        before = save_buffers(modules_of(guide))
        with gates:
            q = layout.trace(guide, args, self.particles)
        doubly = self.doubly_reparametrised and torch.is_grad_enabled()
        given = gates.closed(q) if doubly else q
        p = layout.trace(model, args, self.particles, given)
        own = guide_parameters(model, guide, p, q) if doubly else []
        scored_q = q
        if own:
            for module, name, buffer, value in before:
                if (
                    buffer is not None and value is not None
                ):  # a guide may learn from its draws; .data: not a step
                    module._buffers[name].data.copy_(value)
            with _frozen(own):
                scored_q = layout.trace(guide, args, self.particles, given)
        _check(p, q, layout)
        bound = _Bound.of(p, q, scored_q, layout)
        if own and is_validation_enabled():
            _check_repeats(q, scored_q, layout)
        return -bound.estimate(gates, own, self.particles)


@dataclass(frozen=True)
class _Bound:
    shared: Any
    log_weights: Tensor
    scale: float
    dim: int

    @classmethod
    def of(cls, p: Any, q: Any, scored_q: Any, layout: Layout) -> "_Bound":
        """`q` scores global sites, `scored_q` local ones."""
        for trace, wanted in ((p, scored(p)), (q, layout.globals(q)), (scored_q, layout.locals(scored_q))):
            names = {name for name, _ in wanted}
            trace.compute_log_prob(lambda name, site, names=names: name in names)
        for trace in (p, scored_q):
            for name, site in layout.locals(trace):
                check_dimensions(name, torch.as_tensor(site["log_prob"]).shape, layout.nesting + 1)
        units: Units = layout.units(p, scored_q)
        log_weights = units.total(layout.locals(p)) - units.total(layout.locals(scored_q))
        _check_apart(p, q, layout)
        shared = sum(site["log_prob_sum"] for _, site in layout.globals(p))
        shared = shared - sum(_entropy_term(site) for _, site in layout.globals(q))
        return cls(shared, log_weights, units.scale, layout.dim)

    def estimate(self, gates: "_Gates", own: list[Tensor], particles: int) -> Tensor:
        mean = self.log_weights.logsumexp(self.dim) - math.log(particles)
        value = self.shared + self.scale * mean.sum()
        if not own:
            return value
        weights = self.log_weights.detach().softmax(self.dim)
        inner = self.shared + self.scale * (weights * self.log_weights).sum()
        surrogate = inner if particles == 1 else gates.surrogate(inner, weights, own)
        return value.detach() + (surrogate - surrogate.detach())


class _Gates(Messenger):
    """Where gradients pass from scoring to sampling, each multiplied by a number set for each backward pass.

    A parameter of the guide alone takes the gradient through local draws times the normalised weight; what
    enters log q as well (parameters of the model, global latents) takes it as it is. So there are three passes:
    to the guide's parameters with global latents shut; to the rest with all open; and from global latents to the
    guide's parameters.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.local: Tensor | float = 1.0
        self.shared = 1.0
        self.raw: list[Tensor] = []
        self.views: list[Tensor] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if self.layout.is_local(msg) or not (isinstance(value, Tensor) and value.requires_grad):
            return
        view = value.view_as(value)
        view.register_hook(lambda grad: grad * self.shared)
        self.raw.append(value)
        self.views.append(view)
        msg["value"] = view

    def closed(self, trace: Any) -> Any:
        """The trace with its local values behind gates."""
        out = trace.copy()
        for name, site in self.layout.locals(trace):
            value, event = site["value"], len(site["fn"].event_shape)
            if value.requires_grad:
                value = value.view_as(value)
                value.register_hook(lambda grad, event=event: grad * self._lifted(event))
                out.nodes[name] = {**site, "value": value}
        return out

    def _lifted(self, event: int) -> "Tensor | float":
        if not isinstance(self.local, Tensor):
            return self.local
        return self.local.reshape(*self.local.shape, *[1] * event)

    def surrogate(self, inner: Tensor, weights: Tensor, own: list[Tensor]) -> Tensor:
        """A number with the gradients of the three passes."""
        known = {id(p) for p in own}
        rest = [leaf for leaf in leaves(inner) if id(leaf) not in known]
        self.local, self.shared = weights, 0.0
        direct = _gradients(inner, own)
        self.local, self.shared = 1.0, 1.0
        others = _gradients(inner, [*rest, *self.views])
        self.shared = 0.0
        arriving = others[len(rest) :]
        reached = [(raw, g) for raw, g in zip(self.raw, arriving, strict=True) if g is not None]
        through = _gradients([raw for raw, _ in reached], own, [g for _, g in reached]) if reached else []
        self.shared = 1.0
        pairs = [*zip(own, direct, strict=True), *zip(rest, others, strict=False)]
        pairs += zip(own, through, strict=False)
        return sum(((g * p).sum() for p, g in pairs if g is not None), inner.new_zeros(()))


def _entropy_term(site: dict[str, Any]) -> Any:
    parts = site["fn"].score_parts(site["value"], *site["args"], **site["kwargs"])
    return parts.scale_and_mask(site["scale"], site["mask"]).entropy_term.sum()


def _gradients(outputs: Any, inputs: list[Tensor], weights: Any = None) -> tuple[Tensor | None, ...]:
    if not inputs:
        return ()
    return torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True)


@contextmanager
def _frozen(parameters: list[Tensor]) -> Iterator[None]:
    """What is computed inside does not depend on the parameters."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _check(p: Any, q: Any, layout: Layout) -> None:
    latents = {name for name, site in scored(p) if not site["is_observed"]}
    drawn = dict(scored(q))
    # AutoNormal draws in unconstrained space, in sites of its own.
    if latents != {n for n, s in drawn.items() if not (s["infer"] or {}).get("is_auxiliary")}:
        raise FitError(
            f"IWAE: the model has the latents {sorted(latents)}, the guide draws {sorted(drawn)}, and a weight needs "
            "both densities of each. Sum discrete latents out of the likelihood, or use ELBO()."
        )
    for name, site in drawn.items():
        if not site["fn"].has_rsample:
            raise FitError(
                f"IWAE: latent '{name}' has no rsample, so its gradient is missing. Use ELBO() or sum it out."
            )
        if layout.is_local(site) != layout.is_local(p.nodes.get(name, site)):
            raise FitError(
                f"IWAE: latent '{name}' stands inside plate '{layout.plate}' in one of model and guide only. Write "
                "the plate in both."
            )


def _check_apart(p: Any, q: Any, layout: Layout) -> None:
    for trace in (p, q):
        for name, site in layout.globals(trace):
            if torch.as_tensor(site["log_prob"]).dim() > layout.nesting:
                raise FitError(
                    f"IWAE: site '{name}' stands outside plate '{layout.plate}' and depends on latents inside it, so "
                    "the weights of the series are not independent. Move it inside, or name an outer plate=."
                )


@torch.no_grad()
def _check_repeats(q: Any, again: Any, layout: Layout) -> None:
    for name, site in layout.locals(q):
        before, after = site["fn"].log_prob(site["value"]), again.nodes[name]["unscaled_log_prob"]
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise FitError(
                f"IWAE: run twice on the same values, the guide gives latent '{name}' two densities. It must not be "
                "random beyond its sites (dropout): switch that off, or use doubly_reparametrised=False."
            )
