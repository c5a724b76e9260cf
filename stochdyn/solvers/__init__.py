"""Solvers as values: kernels, which have a transition density, and integrators, which only integrate.

How to choose: docs/how-to-choose-a-solver.md.
"""

from stochdyn.solvers.adaptive import BDF, Dopri5, Dopri8, Radau, Tsit5
from stochdyn.solvers.backends.torchsde import SRK, BrownianMotion, ReversibleHeun
from stochdyn.solvers.euler_maruyama import EulerMaruyama, TamedEuler
from stochdyn.solvers.exponential import ExponentialEuler
from stochdyn.solvers.gaussian_step import GaussianStep
from stochdyn.solvers.gradients import AbstractGradient, Adjoint, Checkpointed, Direct
from stochdyn.solvers.integrator import AbstractMean, AbstractODESolver, Drift
from stochdyn.solvers.kernel import AbstractKernel, AbstractSDESolver, AbstractStepSolver, as_kernel
from stochdyn.solvers.milstein import Milstein
from stochdyn.solvers.rosenbrock import Rosenbrock
from stochdyn.solvers.runge_kutta import Euler, Heun, Midpoint, RungeKutta4
from stochdyn.solvers.stratonovich import StratonovichHeun, StratonovichMidpoint, ito_drift
from stochdyn.solvers.verlet import Verlet
