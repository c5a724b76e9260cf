"""A latent stochastic differential equation: process, decoder, encoder and guide, to be copied and edited."""

import pyro
from torch import Tensor, nn

from stochdyn.data import AbstractInterpolation, Carried, Series, TimeGrid
from stochdyn.decoders import AbstractDecoder, NormalDecoder
from stochdyn.encoders import AbstractEncoder, GRUEncoder
from stochdyn.guides import AmortizedGuide, FreeMessage
from stochdyn.guides.messages import AbstractPathFamily
from stochdyn.paths import Compiled
from stochdyn.processes import NeuralSDE


class LatentSDE(nn.Module):
    """A latent neural SDE, observed with noise: z = process(ts), y ~ decoder(z(t)) at the times of every series.

    Missing and censored values (`Series(..., mask=, lower=, upper=)`) are dealt with by `batch.observe`.

    `model(batch)` is the model, `model.guide(batch)` its amortised guide: `sd.fit(model, model.guide, batch)`. Every
    part can be replaced by a module of your own.

    Args:
        obs_dim: number of channels.
        state_dim: number of latent states.
        hidden: width of all networks.
        substeps: steps per gap between observations.
        noise: standard deviation of the observations at the start of training, in the units of the data.
        covariates: number of covariates of the series; they enter the drift, and the encoder at observed times.
        interpolation: what covariates are between the times at which they were given.
        process: in place of a `NeuralSDE(state_dim, hidden, context_dim=covariates)`.
        decoder: in place of a linear `NormalDecoder`.
        encoder: in place of a `GRUEncoder(obs_dim, hidden, covariates=covariates)`.
        paths: how the guide guides the path: messages (`FreeMessage()`), or `PosteriorDrift()`, `Marginals()`.
        loop: `Compiled()` compiles the guide's loop over time.

    Raises:
        FieldError, ShapeError: when called with a batch of another number of covariates.

    References:
        Li, Wong, Chen & Duvenaud, "Scalable gradients for stochastic differential equations", 2020,
        https://arxiv.org/abs/2001.01328

    Example:
        >>> import torch, stochdyn as sd
        >>> batch = sd.Series(torch.linspace(0, 1, 6), torch.randn(8, 6, 3))
        >>> model = sd.LatentSDE(obs_dim=3, state_dim=2, hidden=16)
        >>> fit = sd.fit(model, model.guide, batch, steps=5, progress=False)
        >>> sd.predict(fit, batch, draws=10).observations.shape
        torch.Size([10, 8, 6, 3])
    """

    def __init__(
        self,
        obs_dim: int,
        state_dim: int,
        *,
        hidden: int = 64,
        substeps: int = 2,
        noise: float = 0.1,
        covariates: int = 0,
        interpolation: AbstractInterpolation = Carried(),  # noqa: B008
        process: nn.Module | None = None,
        decoder: AbstractDecoder | None = None,
        encoder: AbstractEncoder | None = None,
        paths: AbstractPathFamily = FreeMessage(),  # noqa: B008
        loop: Compiled | None = None,
    ) -> None:
        super().__init__()
        self.substeps, self.covariates, self.interpolation = substeps, covariates, interpolation
        self.process = process or NeuralSDE(state_dim, hidden, context_dim=covariates)
        self.decoder = decoder or NormalDecoder(nn.Linear(state_dim, obs_dim), obs_dim, scale=noise)
        encoder = encoder or GRUEncoder(obs_dim, hidden, covariates=covariates)
        guide = AmortizedGuide(self, encoder, paths=paths, hidden=hidden, loop=loop)
        self._guide = (guide,)  # outside the module tree: what the guide learns is not the model's

    @property
    def guide(self) -> AmortizedGuide:
        """The amortised guide of this model."""
        return self._guide[0]

    def forward(self, batch: Series) -> Tensor:
        grid = TimeGrid(batch.times, substeps=self.substeps)
        context = [grid.context(batch, self.interpolation)] if self.covariates else []
        with batch.plate("series"):
            z = pyro.sample("z", self.process(grid.ts, *context))
            batch.observe("y", self.decoder(grid.observed(z)))
        return z
