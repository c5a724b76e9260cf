"""The Euler-Maruyama step, and its tamed form for drifts that grow faster than linearly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.solvers.integrator import Drift
from stochdyn.solvers.kernel import AbstractEulerNoise


@dataclass(frozen=True)
class EulerMaruyama(AbstractEulerNoise):
    """Euler-Maruyama: z' = z + f(t, z) dt + g(t, z) sqrt(dt) xi.

    Itô convention. Strong order 1/2 (1 for additive noise), weak order 1, one call of drift and diffusion.
    Prefer `GaussianStep(mean=Heun())` for models whose parameters are read.

    References:
        Maruyama, "Continuous Markov processes and stochastic equations", 1955,
        https://doi.org/10.1007/BF02846028

    Example:
        >>> import stochdyn as sd
        >>> sd.EulerMaruyama() == sd.EulerMaruyama()
        True
    """

    def advance(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        return z + drift(t, z) * dt


@dataclass(frozen=True)
class TamedEuler(AbstractEulerNoise):
    """Tamed Euler-Maruyama: z' = z + f dt / (1 + |f| dt) + g sqrt(dt) xi, with |f| over the state.

    Itô convention. Strong order 1/2 (1 for additive noise), weak order 1, one call of drift and diffusion, for drifts
    that grow faster than linearly and pull back (z - z^3): Euler-Maruyama explodes there with positive probability at
    every step size. No step's mean moves by more than a length of 1 in the units of the state, so bring the state near
    unit scale; at coarse steps strong drifts are slowed down, which biases rates. `EulerMaruyama` is better where the
    drift is Lipschitz.

    References:
        Hutzenthaler, Jentzen & Kloeden, "Strong convergence of an explicit numerical method for SDEs with
        nonglobally Lipschitz continuous coefficients", Ann. Appl. Probab. 2012, https://arxiv.org/abs/1010.3756

    Example:
        >>> import torch, stochdyn as sd
        >>> path = sd.SDEPath(lambda t, z: -z**3, torch.tensor([1.0]), torch.tensor([20.0]), torch.linspace(0, 1, 11),
        ...                   solver=sd.TamedEuler())
        >>> bool(path.rsample().isfinite().all())
        True
    """

    def advance(self, drift: Drift, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        move = drift(t, z) * dt
        move = move.expand(*move.shape[:-1], z.shape[-1])
        return z + move / (1 + torch.linalg.vector_norm(move, dim=-1, keepdim=True))
