"""Point processes: Pyro distributions over sequences of jumps."""

from stochdyn.paths.points.base import AbstractPointProcess
from stochdyn.paths.points.correcting import SelfCorrecting
from stochdyn.paths.points.cox import CoxProcess
from stochdyn.paths.points.general import History, PointProcess
from stochdyn.paths.points.hawkes import Hawkes
from stochdyn.paths.points.jump_ode import JumpODE
from stochdyn.paths.points.multivariate import MultivariateHawkes
from stochdyn.paths.points.poisson import PoissonProcess
from stochdyn.paths.points.simulate import AbstractSampler, Inversion, Thinning

__all__ = [
    "AbstractPointProcess",
    "AbstractSampler",
    "CoxProcess",
    "Hawkes",
    "History",
    "Inversion",
    "JumpODE",
    "MultivariateHawkes",
    "PointProcess",
    "PoissonProcess",
    "SelfCorrecting",
    "Thinning",
]
