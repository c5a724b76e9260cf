"""A latent ordinary differential equation from a random start."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from stochdyn.data import AbstractInterpolation, Carried, Series, TimeGrid
from stochdyn.decoders import AbstractDecoder, NormalDecoder
from stochdyn.encoders import AbstractEncoder, ODERNNEncoder
from stochdyn.fields import NeuralField
from stochdyn.guides import AmortizedGuide
from stochdyn.paths import odeint
from stochdyn.solvers import AbstractGradient, AbstractODESolver, Direct, RungeKutta4


class LatentODE(nn.Module):
    """A latent neural ODE from a random start: z0 ~ N(0, 1), dz/dt = field(z), y ~ decoder(z(t)).

    Everything that differs between two series is in their starts: given z0 the trajectory is certain, so misfits count
    as observation noise, and forecasts are as narrow as the posterior of z0. Where the system itself is random use
    `LatentSDE`.

    `model(batch)` is the model, `model.guide(batch)` its amortised guide: `sd.fit(model, model.guide, batch)`. Every
    part can be replaced by a module of your own. Missing and censored values are dealt with by `batch.observe`.

    Args:
        obs_dim: number of channels.
        state_dim: number of latent states.
        hidden: width of all networks.
        noise: standard deviation of the observations at the start of training, in the units of the data.
        covariates: number of covariates of the series; they enter the field, and the encoder at observed times.
        interpolation: what covariates are between the times at which they were given.
        field: `(t, z[, context])` in place of a `NeuralField`.
        decoder: in place of a linear `NormalDecoder`.
        encoder: in place of an `ODERNNEncoder(obs_dim, hidden)`.
        solver: from one observation time to the next; `Dopri5()` adapts its steps.
        gradient: `Checkpointed()` for long series.

    References:
        Rubanova, Chen & Duvenaud, "Latent ODEs for irregularly-sampled time series", 2019,
        https://arxiv.org/abs/1907.03907

    Example:
        >>> import torch, stochdyn as sd
        >>> batch = sd.Series(torch.linspace(0, 1, 6), torch.randn(8, 6, 3))
        >>> model = sd.LatentODE(obs_dim=3, state_dim=2, hidden=16)
        >>> fit = sd.fit(model, model.guide, batch, steps=5, progress=False)
        >>> sd.predict(fit, batch, ts=[1.5], draws=10).states.shape
        torch.Size([10, 8, 7, 2])
    """

    def __init__(
        self,
        obs_dim: int,
        state_dim: int,
        *,
        hidden: int = 64,
        noise: float = 0.1,
        covariates: int = 0,
        interpolation: AbstractInterpolation = Carried(),  # noqa: B008
        field: nn.Module | None = None,
        decoder: AbstractDecoder | None = None,
        encoder: AbstractEncoder | None = None,
        solver: AbstractODESolver = RungeKutta4(2),  # noqa: B008
        gradient: AbstractGradient = Direct(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.state_dim, self.covariates, self.interpolation = state_dim, covariates, interpolation
        self.solver, self.gradient = solver, gradient
        self.field = field or NeuralField(state_dim, hidden=(hidden, hidden), context_dim=covariates)
        self.decoder = decoder or NormalDecoder(nn.Linear(state_dim, obs_dim), obs_dim, scale=noise)
        encoder = encoder or ODERNNEncoder(obs_dim, hidden, covariates=covariates)
        guide = AmortizedGuide(self, encoder, amortize={"z0": "series"}, hidden=hidden)
        self._guide = (guide,)  # outside the module tree: what the guide learns is not the model's

    @property
    def guide(self) -> AmortizedGuide:
        """The amortised guide of this model."""
        return self._guide[0]

    def forward(self, batch: Series) -> Tensor:
        grid = TimeGrid(batch.times, substeps=1)
        context = grid.context(batch, self.interpolation) if self.covariates else None
        options = {"solver": self.solver, "gradient": self.gradient, "context": context}
        with batch.plate("series"):
            zero = torch.zeros(self.state_dim, dtype=batch.values.dtype, device=batch.values.device)
            z0 = pyro.sample("z0", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            z = pyro.deterministic("z", odeint(self.field, z0, grid.ts, **options), event_dim=2)
            batch.observe("y", self.decoder(z))
        return z
