"""The stationary law of a linear SDE, as the start of a path."""

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

from stochdyn.errors import DiffusionError, FieldError, ShapeError, StabilityError, TimeError
from stochdyn.fields import AbstractDiffusion, Field, as_diffusion, evaluate, has_random_weights, probe
from stochdyn.fields.zeros import find_zeros, jacobian
from stochdyn.paths.checks import short
from stochdyn.solvers import AbstractKernel, EulerMaruyama


class Stationary(dist.MultivariateNormal):
    """The stationary law of dz = f(z) dt + g dW, for the `initial` of a path: N(m, S) with f(m) = 0.

    With A the Jacobian of f at m: A S + S A' + g g' = 0, or for a chain of step `dt`, S = M S M' + G G', with M and G
    those of its kernel. Exact for a linear drift with constant noise. For others it is the linear noise approximation
    at the fixed point that Newton's method reaches from `around`.

    A model's grid is a chain: with `dt` and the solver of the path its law is the same at all times, without `dt` it
    drifts from the continuous law to the chain's own in the first relaxation time. Where steps differ, or where the
    quantity of interest is the continuous law, leave `dt` out and take short steps.

    Differentiable in whatever drift and diffusion depend on. The covariance comes from one linear system of state^2
    equations for each member of the batch, in float64: at ease up to about 30 states.

    Args:
        drift: f, `(t, z[, context])` -> shape of z, as the path has it; parameters of batch shape as theta[..., None].
        diffusion: g, as the path has it; taken at the fixed point.
        around: (*batch, state) where to look for the fixed point, in the dtype of the result. Any point does for a
            linear drift.
        dt: the step of the grid, in the units of time; None for the continuous law.
        solver: the path's kernel; used with `dt` only.
        t: the time at which drift and diffusion are taken.
        context: (*batch, context_dim), a static input.

    Shapes:
        batch_shape: broadcast of around, context and of what the fields return. event_shape: (state,).

    Raises:
        StabilityError: if an eigenvalue of A is not in the left half-plane (of M: not inside the unit circle), with the
            eigenvalue and the member of the batch.
        FieldError: if no fixed point is found.
        DiffusionError: if no noise reaches a combination of the states.

    References:
        Särkkä & Solin, "Applied Stochastic Differential Equations", 2019, section 6.5,
        https://doi.org/10.1017/9781108186735

    Example:
        >>> import stochdyn as sd
        >>> theta = torch.tensor([0.5, 2.0])
        >>> start = sd.Stationary(lambda t, z: theta[..., None] * (1 - z), torch.tensor([1.0]), torch.zeros(1))
        >>> start.mean.flatten(), start.variance.flatten()
        (tensor([1., 1.]), tensor([1.0000, 0.2500]))
        >>> path = sd.SDEPath(lambda t, z: theta[..., None] * (1 - z), torch.tensor([1.0]), start,
        ...                   torch.linspace(0, 1, 11))
        >>> path.batch_shape
        torch.Size([2])
    """

    def __init__(
        self,
        drift: Field,
        diffusion: "Field | Tensor | AbstractDiffusion",
        around: Tensor,
        *,
        dt: float | None = None,
        solver: AbstractKernel = EulerMaruyama(),  # noqa: B008
        t: float = 0.0,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        time, noise = _check(around, dt, t), as_diffusion(diffusion)
        if has_random_weights(drift) or has_random_weights(noise):
            raise FieldError(
                "Stationary: the weights of drift or diffusion are random, and would not be those of the path. Draw "
                "them once, f = sd.draw_weights(f), and give that to both."
            )
        given = around if context is None else around.expand(*_joint(around, context), around.shape[-1])
        batch, _ = probe(drift, noise, time, given, context)

        def f(z: Tensor) -> Tensor:
            return evaluate("drift", drift, time, z, context).expand(z.shape)

        loc = _fixed_point(f, around.detach().expand(*batch, around.shape[-1]))
        if dt is None:
            slope, factor = jacobian(f, loc), noise(time, loc, context)
        else:
            step = torch.full_like(time, dt)
            _, factor = solver.step(lambda s, z: f(z), noise, time, step, loc, context)
            slope = jacobian(lambda z: solver.advance(lambda s, x: f(x), time, step, z), loc)
        forcing = (
            factor @ factor.mT if not noise.diagonal else torch.diag_embed(factor.expand(loc.shape) ** 2)
        )
        _check_stable(slope, discrete=dt is not None)
        covariance = lyapunov(slope, forcing.expand(slope.shape), discrete=dt is not None)
        super().__init__(loc, scale_tril=_cholesky(covariance).to(loc.dtype), validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> dist.MultivariateNormal:
        return super().expand(batch_shape, _instance=object.__new__(dist.MultivariateNormal))


def lyapunov(A: Tensor, Q: Tensor, *, discrete: bool = False) -> Tensor:
    """Solve A S + S A' + Q = 0, or S = A S A' + Q, by the linear system of its entries, in float64.

    Shapes:
        A, Q (*batch, state, state) -> (*batch, state, state)

    Example:
        >>> lyapunov(torch.tensor([[-2.0]]), torch.tensor([[1.0]]))
        tensor([[0.2500]], dtype=torch.float64)
    """
    A, Q = A.double(), Q.double()
    n = A.shape[-1]
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    if discrete:
        system = torch.eye(n * n, dtype=A.dtype, device=A.device) - _kronecker(A, A)
    else:
        system = -(_kronecker(A, eye.expand(A.shape)) + _kronecker(eye.expand(A.shape), A))
    S = torch.linalg.solve(system, Q.reshape(*Q.shape[:-2], n * n, 1)).reshape(Q.shape)
    return 0.5 * (S + S.mT)


def _kronecker(A: Tensor, B: Tensor) -> Tensor:
    n = A.shape[-1] * B.shape[-1]
    return torch.einsum("...ij,...kl->...ikjl", A, B).reshape(*A.shape[:-2], n, n)


def _check(around: Tensor, dt: float | None, t: float) -> Tensor:
    if not isinstance(around, Tensor) or around.dim() < 1 or not around.is_floating_point():
        raise ShapeError(
            "Stationary: `around` must be a floating tensor (*batch, state), e.g. torch.zeros(2)."
        )
    if dt is not None and not 0 < dt < float("inf"):
        raise TimeError(
            f"Stationary: `dt` must be positive and finite, got {dt}. It is the step of the grid."
        )
    return torch.full((1,) * around.dim(), t, dtype=around.dtype, device=around.device)


def _joint(around: Tensor, context: Tensor) -> torch.Size:
    try:
        return torch.broadcast_shapes(around.shape[:-1], context.shape[:-1])
    except RuntimeError as error:
        raise ShapeError(
            f"Stationary: the batches of `around` {tuple(around.shape[:-1])} and `context` "
            f"{tuple(context.shape[:-1])} do not broadcast. A context is (*batch, context_dim)."
        ) from error


def _fixed_point(f: Callable[[Tensor], Tensor], around: Tensor) -> Tensor:
    """Newton's method without gradients, and one step with: by the implicit function theorem they are right."""
    tolerance = torch.finfo(around.dtype).eps ** 0.5
    with torch.no_grad():
        slope = torch.linalg.matrix_norm(jacobian(f, around))
        scale = torch.linalg.vector_norm(f(around), dim=-1) + slope * (1 + around.abs().amax(-1))
        loc, speed = find_zeros(f, around, scale, tolerance=tolerance)
        J = jacobian(f, loc)
    bad = ~(speed <= tolerance * scale)
    if bool(bad.any()):
        raise FieldError(
            f"Stationary, {_member(bad)}: no fixed point found, the drift is still {speed[bad][0].item():.3g} at "
            f"{short(loc[bad][0])}. Start nearer with `around`; a drift without a zero has no stationary law."
        )
    _check_stable(J, discrete=False)
    return loc - torch.linalg.solve(J, f(loc)[..., None])[..., 0]


def _check_stable(slope: Tensor, *, discrete: bool) -> None:
    values = torch.linalg.eigvals(slope.detach())
    size = values.abs() if discrete else values.real
    edge = 1.0 if discrete else 0.0
    bad = ~(size < edge - 8 * torch.finfo(slope.dtype).eps * values.abs().amax(-1, keepdim=True))
    if not bool(bad.any()):
        return
    where = bad.any(-1)
    value = values[where][0][size[where][0].argmax()]
    shown = f"{value.real.item():.6g}" + (f"{value.imag.item():+.6g}i" if value.imag != 0 else "")
    if discrete:
        raise StabilityError(
            f"Stationary, {_member(where)}: the step's matrix has eigenvalue {shown}, not inside the unit circle, so "
            "the chain has no stationary law though the SDE has one. Take a shorter dt, or a solver of higher order."
        )
    raise StabilityError(
        f"Stationary, {_member(where)}: the drift has eigenvalue {shown} at its fixed point, whose real part is not "
        "negative, so there is no stationary law. Constrain its parameters, or give another `initial`."
    )


def _cholesky(covariance: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    size = covariance.diagonal(dim1=-2, dim2=-1).amax(-1)
    bad = (failed > 0) | ~(pivots.detach().amin(-1) ** 2 > 1e-13 * size.detach())
    if bool(bad.any()):
        raise DiffusionError(
            f"Stationary, {_member(bad)}: the covariance is singular, so a combination of the states gets no noise. "
            "Add noise there, or start the path elsewhere."
        )
    return factor


def _member(bad: Tensor) -> str:
    index = bad.nonzero()[0].tolist()
    return f"batch member {index[0] if len(index) == 1 else tuple(index)}" if index else "one member"
