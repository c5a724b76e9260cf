"""Fields: what a path is made of."""

from stochdyn.fields.bayesian import (
    WidthScaled,
    bayesian,
    draw_weights,
    has_drawn_weights,
    has_random_weights,
)
from stochdyn.fields.calls import Field, call_field, evaluate
from stochdyn.fields.diffusion import (
    AbstractDiffusion,
    DiagonalDiffusion,
    MatrixDiffusion,
    as_diffusion,
    check_diffusion,
    probe,
)
from stochdyn.fields.hamiltonian import HamiltonianField
from stochdyn.fields.jumps import (
    AbstractAdditiveJump,
    AbstractLinearFlow,
    AdditiveJump,
    DecayFlow,
    JumpIntensity,
    NeuralJump,
)
from stochdyn.fields.known import Residual
from stochdyn.fields.lipschitz import Bjorck, GroupSort, LipschitzMLP
from stochdyn.fields.neural import MLP, ElementwiseField, Linear, NeuralField
from stochdyn.fields.observed import (
    AbstractMemoryFlow,
    GRUFlow,
    GRUJump,
    Memory,
    MemoryFlow,
    ResetJump,
)
from stochdyn.fields.stable import AntisymmetricField, BoundedField
from stochdyn.fields.time import AbstractTimeFeatures, FourierTime
