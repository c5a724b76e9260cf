"""A stochastic differential equation's path as one sample site."""

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn.fields import AbstractDiffusion, Field, as_diffusion
from stochdyn.paths.chain import Chain, Known
from stochdyn.paths.compiled import Compiled
from stochdyn.paths.guided import GuidedPath, fitting, start_has_rsample
from stochdyn.paths.message import Message, backward_information, linearise
from stochdyn.paths.start import as_start
from stochdyn.paths.steering import Control
from stochdyn.paths.support import path_support
from stochdyn.solvers import AbstractKernel, EulerMaruyama


class SDEPath(dist.TorchDistribution):
    """The path of dz = f(t, z) dt + g(t, z) dW on a grid, as a distribution over whole trajectories.

    The value is the discretised Markov chain at the grid times, the initial state included: its density is
    exact, one vectorised call of the fields. An Itô SDE.

    Args:
        drift: f, `(t, z[, context])` -> shape of z; units state per time. Write parameters of batch shape as
            theta[..., None] against z.
        diffusion: g, a tensor or callable of z's shape (diagonal noise), or `MatrixDiffusion`; units state
            per square root of time.
        initial: a distribution with event_shape (state,), or a tensor (*batch, state) or a Delta: a known
            start, without density.
        ts: the grid (*batch, time), float64; non-decreasing. Steps of zero length (padding) have no density.
        solver: the kernel; `GaussianStep(mean=Heun())` for mechanistic models.
        context: (*batch, context_dim), or (*batch, time, context_dim): the row at a step's start is used in
            it.

    Shapes:
        batch_shape: broadcast of initial, ts, context and of what the fields return. event_shape: (time,
            state).

    Raises:
        FieldError, DiffusionError, ShapeError, DtypeError: at once, from calling each field once.
        TimeError: if the grid goes back, is not finite, or too fine for the dtype.
        DivergedError: if a sample leaves the finite numbers (while validation is on).
        SupportError: if the density is asked of a value that cannot come from this path.

    Example:
        >>> import pyro, pyro.distributions as dist, stochdyn as sd
        >>> grid = sd.TimeGrid(torch.tensor([0.0, 0.3, 1.0]), substeps=5)
        >>> theta = torch.tensor([0.5, 1.0, 2.0])
        >>> path = sd.SDEPath(lambda t, z: -theta[..., None] * z, torch.tensor([0.3]),
        ...                   dist.Normal(torch.zeros(1), 1.0).to_event(1), grid.ts)
        >>> path.batch_shape, path.event_shape
        (torch.Size([3]), torch.Size([11, 1]))
        >>> path.log_prob(path.rsample()).shape
        torch.Size([3])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        drift: Field,
        diffusion: Field | Tensor | AbstractDiffusion,
        initial: dist.TorchDistribution | Tensor,
        ts: Tensor,
        *,
        solver: AbstractKernel = EulerMaruyama(),  # noqa: B008
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        validate = self._validate_args if validate_args is None else validate_args
        self.chain = Chain(
            drift, as_diffusion(diffusion), as_start(initial), ts, solver, context, validate=bool(validate)
        )
        event_shape = torch.Size((self.chain.steps + 1, self.chain.state_dim))
        self._drawn: Tensor | None = None
        self._recalled: GuidedPath | None = None
        self.has_rsample = start_has_rsample(self.chain)
        super().__init__(self.chain.batch_shape, event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return path_support(self.chain)

    @property
    def ts(self) -> Tensor:
        """The grid (*batch, time), float64."""
        return self.chain.ts

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "SDEPath":
        new = object.__new__(SDEPath)
        new.__dict__.update(self.__dict__)
        new.chain, new._drawn, new._recalled = self.chain.expand(torch.Size(batch_shape)), None, None
        new._batch_shape = torch.Size(batch_shape)
        return new

    def _validate_sample(self, value: Tensor) -> None:
        self.chain.check_value(value)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        self._drawn = self.guided().rsample(sample_shape)
        return self._drawn

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = self.chain.aligned(value)
        self.chain.check_start(value)
        _, noise, xi, real = self.chain.steps_of(value, self._known(value))
        return self.chain.start.log_prob(value[..., 0, :]) + self.chain.log_prob_of(noise, xi, real)

    def recall(self, drawn: GuidedPath) -> None:
        """Let `log_prob` of the path that a guide drew last reuse what drawing it computed; see `GuidedPath.recall`.

        Only where the guide's fields are the same objects as this path's, with constant parts or modules.
        """
        self._recalled = drawn

    def _known(self, value: Tensor) -> Known | None:
        drawn = self._recalled
        known = None if drawn is None else drawn.known(value)
        if drawn is None or known is None or not self.chain.same_noise(drawn.chain):
            return None
        return known if drawn.steered is None and self.chain.same_drift(drawn.chain) else (None, known[1])

    def guided(
        self,
        message: "Message | tuple[Tensor, Tensor] | None" = None,
        control: Control | None = None,
        *,
        drift: Field | None = None,
        context: Tensor | None = None,
        score_message: Message | None = None,
        score_context: Tensor | None = None,
        loop: Compiled | None = None,
    ) -> GuidedPath:
        """The same path, twisted: what a guide samples.

        Args:
            message: a `Message`, or (loc, precision) with loc (*batch, time, state) and precision (*batch,
                time, state) or (*batch, time, state, state). Precision 0 is no message.
            control: `(t, z[, context]) -> (..., noise)`, a drift in noise units added to every step.
            drift: `(t, z[, context]) -> (..., state)`, in place of the prior's drift; without control, and with a
                message of one time only, which acts on the start.
            context: (*batch, context_dim) or (*batch, time, context_dim), for `drift` or `control`, instead of the
                path's own.
            score_message, score_context, loop: see `GuidedPath`.

        Raises:
            GuideError, ShapeError, FieldError: if message or control do not fit this path.

        Example:
            >>> import stochdyn as sd
            >>> path = sd.SDEPath(lambda t, z: -z, torch.tensor([0.5]), torch.zeros(1),
            ...                   torch.linspace(0, 1, 11))
            >>> guided = path.guided(control=lambda t, z: torch.ones_like(z))
            >>> z = guided.rsample()
            >>> bool((guided.log_prob(z) != path.log_prob(z)).all())
            True
        """
        if isinstance(message, tuple):
            message = Message.at(*message)
        return GuidedPath(
            self.chain,
            message,
            control,
            score_message,
            drift=drift,
            context=context,
            score_context=score_context,
            loop=loop,
            validate_args=self._validate_args,
        )


def information_filter(path: SDEPath, potential: Message, around: Tensor | None = None) -> Message:
    """Messages from the backward information filter of the linearised path.

    Exact for linear-Gaussian models: the guided path is then the posterior, untrained.

    Args:
        path: the prior.
        potential: the (Gaussian, or locally Gaussian) log likelihood of every state, e.g. `Message.observed`.
        around: the path (*batch, time, state) to linearise around; by default the prior's path without noise.

    Returns:
        A `Message` with full precision on the path's grid.

    Raises:
        GuideError: if the potential is on another grid.
        DivergedError: if the path to linearise around is not finite.

    References:
        Särkkä & García-Fernández, "Temporal parallelization of Bayesian smoothers", IEEE TAC 2021,
        https://doi.org/10.1109/TAC.2020.2976316

    Example:
        >>> import stochdyn as sd
        >>> grid = sd.TimeGrid(torch.tensor([0.0, 1.0]))
        >>> path = sd.SDEPath(lambda t, z: -z, torch.tensor([0.5]), torch.zeros(1), grid.ts)
        >>> seen = torch.ones(2, 1, dtype=torch.bool)
        >>> message = sd.information_filter(path, sd.Message.observed(grid, torch.ones(2, 1), seen, 0.1))
        >>> message.precision.shape
        torch.Size([6, 1, 1])
    """
    chain = path.chain
    fitting(potential, chain)
    if around is None:
        zeros = torch.zeros(chain.steps + 1, *chain.batch_shape, chain.state_dim, dtype=chain.dtype)
        around = path.guided().transport(zeros.to(chain.device))
    if chain.validate:
        chain.check_finite(chain.aligned(around))
    return backward_information(linearise(chain, around), potential)
