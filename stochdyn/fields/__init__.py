"""Fields: what a path is made of."""

from stochdyn.fields.calls import Field, call_field, evaluate
from stochdyn.fields.diffusion import (
    AbstractDiffusion,
    DiagonalDiffusion,
    MatrixDiffusion,
    as_diffusion,
    check_diffusion,
    probe,
)
from stochdyn.fields.neural import MLP, ElementwiseField, Linear, NeuralField
