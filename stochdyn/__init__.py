"""Probabilistic models of stochastic and jump dynamics in Pyro: a path is one sample site."""

from typing import TYPE_CHECKING, Any

import stochdyn.diagnostics as _diagnostics
from stochdyn.data import AbstractInterpolation, Carried, LinearInterpolation, Series, TimeGrid, datasets
from stochdyn.decoders import NormalDecoder
from stochdyn.diagnostics import (
    Calibration,
    FieldReading,
    FixedPoint,
    FixedPoints,
    PosteriorFields,
    TwoSample,
    c2st,
    fixed_points,
    pareto_k,
    plot_calibration,
    plot_field,
    plot_fixed_points,
    plot_forecast,
    plot_losses,
    plot_phase,
    posterior_fields,
    read_field,
    sbc,
    summarise,
    tarp,
)
from stochdyn.encoders import AbstractEncoder, ConvEncoder, GRUEncoder, ODERNNEncoder, SetEncoder
from stochdyn.errors import (
    DataError,
    DiffusionError,
    DivergedError,
    DtypeError,
    FieldError,
    FitError,
    GuideError,
    ShapeError,
    StabilityError,
    StochdynError,
    SupportError,
    TimeError,
)
from stochdyn.fields import MLP, ElementwiseField, MatrixDiffusion, NeuralField
from stochdyn.guides import (
    AmortizedGuide,
    FilterMessage,
    Flow,
    FreeMessage,
    FullRank,
    Marginals,
    MeanField,
    PosteriorDrift,
)
from stochdyn.inference import (
    ELBO,
    IWAE,
    AbstractObjective,
    Aggressive,
    AnalyticKL,
    Constant,
    Cyclical,
    Decay,
    Evidence,
    Fit,
    Linear,
    LogRatio,
    PathELBO,
    PosteriorCollapse,
    Prediction,
    StickingTheLanding,
    evidence,
    fit,
    posterior_collapse,
    predict,
)
from stochdyn.models import LatentSDE
from stochdyn.paths import (
    Compiled,
    GuidedPath,
    MarginalPath,
    Message,
    SDEPath,
    Stationary,
    information_filter,
    particle_evidence,
)
from stochdyn.processes import NeuralSDE
from stochdyn.solvers import EulerMaruyama, GaussianStep, Heun, RungeKutta4

if TYPE_CHECKING:
    from stochdyn.diagnostics import to_arviz

__all__ = [
    "ELBO",
    "IWAE",
    "MLP",
    "AbstractEncoder",
    "AbstractInterpolation",
    "AbstractObjective",
    "Aggressive",
    "AmortizedGuide",
    "AnalyticKL",
    "Calibration",
    "Carried",
    "Compiled",
    "Constant",
    "ConvEncoder",
    "Cyclical",
    "DataError",
    "Decay",
    "DiffusionError",
    "DivergedError",
    "DtypeError",
    "ElementwiseField",
    "EulerMaruyama",
    "Evidence",
    "FieldError",
    "FieldReading",
    "FilterMessage",
    "Fit",
    "FitError",
    "FixedPoint",
    "FixedPoints",
    "Flow",
    "FreeMessage",
    "FullRank",
    "GRUEncoder",
    "GaussianStep",
    "GuideError",
    "GuidedPath",
    "Heun",
    "LatentSDE",
    "Linear",
    "LinearInterpolation",
    "LogRatio",
    "MarginalPath",
    "Marginals",
    "MatrixDiffusion",
    "MeanField",
    "Message",
    "NeuralField",
    "NeuralSDE",
    "NormalDecoder",
    "ODERNNEncoder",
    "PathELBO",
    "PosteriorCollapse",
    "PosteriorDrift",
    "PosteriorFields",
    "Prediction",
    "RungeKutta4",
    "SDEPath",
    "Series",
    "SetEncoder",
    "ShapeError",
    "StabilityError",
    "Stationary",
    "StickingTheLanding",
    "StochdynError",
    "SupportError",
    "TimeError",
    "TimeGrid",
    "TwoSample",
    "c2st",
    "datasets",
    "evidence",
    "fit",
    "fixed_points",
    "information_filter",
    "pareto_k",
    "particle_evidence",
    "plot_calibration",
    "plot_field",
    "plot_fixed_points",
    "plot_forecast",
    "plot_losses",
    "plot_phase",
    "posterior_collapse",
    "posterior_fields",
    "predict",
    "read_field",
    "sbc",
    "summarise",
    "tarp",
    "to_arviz",
]

_LAZY = ("to_arviz",)


def __getattr__(name: str) -> Any:
    """Load ArviZ, which takes seconds, at the first use only."""
    if name in _LAZY:
        return getattr(_diagnostics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
