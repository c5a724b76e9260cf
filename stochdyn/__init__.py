"""Probabilistic models of stochastic and jump dynamics in Pyro: a path is one sample site."""

from typing import TYPE_CHECKING, Any

import stochdyn.diagnostics as _diagnostics
from stochdyn.data import Series, TimeGrid, datasets
from stochdyn.decoders import NormalDecoder
from stochdyn.diagnostics import Calibration, pareto_k, plot_forecast, plot_losses, plot_phase, sbc, summarise
from stochdyn.encoders import AbstractEncoder, GRUEncoder
from stochdyn.errors import (
    DataError,
    DiffusionError,
    DivergedError,
    DtypeError,
    FieldError,
    FitError,
    GuideError,
    ShapeError,
    StochdynError,
    SupportError,
    TimeError,
)
from stochdyn.fields import MLP, ElementwiseField, MatrixDiffusion, NeuralField
from stochdyn.guides import AmortizedGuide, FilterMessage, FreeMessage, FullRank, MeanField
from stochdyn.inference import (
    ELBO,
    AbstractObjective,
    AnalyticKL,
    Constant,
    Decay,
    Evidence,
    Fit,
    Linear,
    LogRatio,
    Prediction,
    StickingTheLanding,
    evidence,
    fit,
    predict,
)
from stochdyn.models import LatentSDE
from stochdyn.paths import GuidedPath, Message, SDEPath, information_filter, particle_evidence
from stochdyn.processes import NeuralSDE
from stochdyn.solvers import EulerMaruyama, GaussianStep, Heun, RungeKutta4

if TYPE_CHECKING:
    from stochdyn.diagnostics import to_arviz

__all__ = [
    "ELBO",
    "MLP",
    "AbstractEncoder",
    "AbstractObjective",
    "AmortizedGuide",
    "AnalyticKL",
    "Calibration",
    "Constant",
    "DataError",
    "Decay",
    "DiffusionError",
    "DivergedError",
    "DtypeError",
    "ElementwiseField",
    "EulerMaruyama",
    "Evidence",
    "FieldError",
    "FilterMessage",
    "Fit",
    "FitError",
    "FreeMessage",
    "FullRank",
    "GRUEncoder",
    "GaussianStep",
    "GuideError",
    "GuidedPath",
    "Heun",
    "LatentSDE",
    "Linear",
    "LogRatio",
    "MatrixDiffusion",
    "MeanField",
    "Message",
    "NeuralField",
    "NeuralSDE",
    "NormalDecoder",
    "Prediction",
    "RungeKutta4",
    "SDEPath",
    "Series",
    "ShapeError",
    "StickingTheLanding",
    "StochdynError",
    "SupportError",
    "TimeError",
    "TimeGrid",
    "datasets",
    "evidence",
    "fit",
    "information_filter",
    "pareto_k",
    "particle_evidence",
    "plot_forecast",
    "plot_losses",
    "plot_phase",
    "predict",
    "sbc",
    "summarise",
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
