"""The likelihood of a path as messages, and the estimate of the path that it is expanded around."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import GuideError
from stochdyn.guides.linearise import likelihood_message
from stochdyn.guides.passes import Given, PathReached, Run, observed_sites, prior_mode, smooth
from stochdyn.guides.plates import Place
from stochdyn.paths import Message, information_filter

Median = Callable[[str, Any, Place], Tensor | None]


@dataclass(frozen=True)
class Smoother:
    """An iterated smoother over a path site of a model.

    Args:
        model: the model.
        median: where the latents that come after the path are held.
        plates: the number of plate dimensions of the model; what is left of them is particles.
        refine: relinearisations.
    """

    model: Callable[..., Any]
    median: Median
    plates: int
    refine: int

    def expanded(self, around: Tensor, run: Run) -> Tensor:
        """A path (*batch, time, state) for every particle of a run."""
        particles = run.leading(self.plates)
        if not particles:
            return around
        between = self.plates - (around.dim() - 2)
        return around.expand(*particles, *[1] * between, *around.shape)

    def likelihood(self, reached: PathReached, around: Tensor, run: Run) -> Message:
        """The messages of everything observed, expanded around (*particles, *batch, time, state)."""

        def log_likelihood(z: Tensor) -> Tensor:
            given = Given(run, {**run.values, reached.name: z}, self.median)
            return _total(observed_sites(self.model, run, given), z, reached.place)

        return likelihood_message(log_likelihood, around)

    @torch.no_grad()
    def refined(self, reached: PathReached, run: Run, plates: int) -> Tensor:
        """The smoothed path (*batch, time, state) of a site with `plates` batch dimensions.

        It starts at the prior's path without noise.
        """
        prior = reached.prior
        around = without_particles(prior_mode(prior), plates)
        for _ in range(self.refine):
            everywhere = self.expanded(around, run)
            message = information_filter(smooth(prior), self.likelihood(reached, everywhere, run), everywhere)
            path = without_particles(prior_mode(prior, message), plates)
            if not torch.isfinite(path).all():
                break
            around = path
        return around


def without_particles(path: Tensor, plates: int) -> Tensor:
    """The mean over the dimensions left of the plates."""
    return path.reshape(-1, *path.shape[path.dim() - plates - 2 :]).mean(0)


def _total(sites: list[dict[str, Any]], z: Tensor, place: Place) -> Tensor:
    """The unscaled log likelihood of everything observed, summed."""
    if not sites:
        raise GuideError(
            "The model observes nothing, so there are no messages. Give `obs=` to a sample statement."
        )
    total = z.new_zeros(())
    for site in sites:
        value = site["fn"].log_prob(site["value"])
        if site["mask"] is not None:
            value = torch.where(torch.as_tensor(site["mask"]), value, torch.zeros_like(value))
        _check_whole(site, value, z, place)
        total = total + value.sum()
    return total


def _check_whole(site: dict[str, Any], value: Tensor, z: Tensor, place: Place) -> None:
    """A path that reads a mini-batch of its own likelihood, which is then scaled up, gives no bound."""
    around = {frame.name for frame in place.frames}
    for frame in site["cond_indep_stack"]:
        part = frame.vectorized and frame.full_size is not None and frame.size != frame.full_size
        if part and frame.name not in around and _depends(value, z):
            raise GuideError(
                f"path site '{place.name}' is shared by the members of plate '{frame.name}', and this run holds "
                f"{frame.size} of {frame.full_size}: messages from a part of the data are no bound of the evidence. "
                "Use all data at every step (batch_size=None), or FreeMessage() without an encoder."
            )


def _depends(value: Tensor, z: Tensor) -> bool:
    if not (value.requires_grad and z.requires_grad):
        return False
    return torch.autograd.grad(value.sum(), z, retain_graph=True, allow_unused=True)[0] is not None
