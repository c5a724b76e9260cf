"""Probabilistic models of stochastic and jump dynamics in Pyro: a path is one sample site."""

from stochdyn.data import Series, TimeGrid, datasets
from stochdyn.diagnostics import pareto_k, plot_forecast, plot_losses, plot_phase, summarise, to_arviz
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
from stochdyn.fields import MatrixDiffusion
from stochdyn.guides import AmortizedGuide, FilterMessage, FreeMessage, FullRank, MeanField
from stochdyn.inference import (
    ELBO,
    AbstractObjective,
    Constant,
    Decay,
    Evidence,
    Fit,
    Linear,
    Prediction,
    evidence,
    fit,
    predict,
)
from stochdyn.paths import GuidedPath, Message, SDEPath, information_filter, particle_evidence
from stochdyn.solvers import EulerMaruyama, GaussianStep, Heun, RungeKutta4
