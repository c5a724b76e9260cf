"""Paths: Pyro distributions over whole trajectories."""

from stochdyn.paths import kl
from stochdyn.paths.compiled import Compiled
from stochdyn.paths.filter import particle_evidence
from stochdyn.paths.guided import GuidedPath
from stochdyn.paths.guided_jumps import GuidedJumpPath
from stochdyn.paths.hybrid import TriggeredJumps
from stochdyn.paths.jump_diffusion import JumpDiffusionPath
from stochdyn.paths.jump_sizes import AbstractJumpSize, CompoundPoisson, DoubleExponentialJump, NormalJump
from stochdyn.paths.marginal import MarginalPath
from stochdyn.paths.message import Message
from stochdyn.paths.mixture_message import MixtureMessage
from stochdyn.paths.ode import odeint
from stochdyn.paths.points import (
    AbstractPointProcess,
    CoxProcess,
    Hawkes,
    History,
    Inversion,
    JumpODE,
    MultivariateHawkes,
    PointProcess,
    PoissonProcess,
    SelfCorrecting,
    Thinning,
)
from stochdyn.paths.schedule import Schedule
from stochdyn.paths.sde import SDEPath, information_filter
from stochdyn.paths.simulate import sdeint
from stochdyn.paths.stationary import Stationary
from stochdyn.paths.trigger import Trigger
