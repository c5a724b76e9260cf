"""Variational inference: objectives, schedules, and `fit`."""

from stochdyn.inference.evidence import Evidence, evidence
from stochdyn.inference.fit import fit
from stochdyn.inference.objective import ELBO, AbstractObjective
from stochdyn.inference.predict import Prediction, predict
from stochdyn.inference.result import Fit
from stochdyn.inference.schedule import Constant, Decay, Linear, Schedule

__all__ = [
    "ELBO",
    "AbstractObjective",
    "Constant",
    "Decay",
    "Evidence",
    "Fit",
    "Linear",
    "Prediction",
    "Schedule",
    "evidence",
    "fit",
    "predict",
]
