"""Variational inference: objectives, schedules, and `fit`."""

from stochdyn.inference.aggressive import Aggressive
from stochdyn.inference.collapse import PosteriorCollapse, posterior_collapse
from stochdyn.inference.estimators import AnalyticKL, LogRatio, StickingTheLanding
from stochdyn.inference.evidence import Evidence, evidence
from stochdyn.inference.fit import fit
from stochdyn.inference.iwae import IWAE
from stochdyn.inference.multistart import Multistart
from stochdyn.inference.objective import ELBO, AbstractObjective
from stochdyn.inference.path_elbo import PathELBO
from stochdyn.inference.predict import Prediction, predict
from stochdyn.inference.result import Fit
from stochdyn.inference.schedule import Constant, Cyclical, Decay, Linear, Schedule

__all__ = [
    "ELBO",
    "IWAE",
    "AbstractObjective",
    "Aggressive",
    "AnalyticKL",
    "Constant",
    "Cyclical",
    "Decay",
    "Evidence",
    "Fit",
    "Linear",
    "LogRatio",
    "Multistart",
    "PosteriorCollapse",
    "Prediction",
    "Schedule",
    "StickingTheLanding",
    "evidence",
    "fit",
    "posterior_collapse",
    "predict",
]
