"""Data: irregular, ragged and masked series, and the grid on which their paths live."""

from stochdyn.data import datasets
from stochdyn.data.covariates import AbstractInterpolation, Carried, LinearInterpolation
from stochdyn.data.doses import Dose, Doses
from stochdyn.data.grid import TimeGrid
from stochdyn.data.series import Series

__all__ = [
    "AbstractInterpolation",
    "Carried",
    "Dose",
    "Doses",
    "LinearInterpolation",
    "Series",
    "TimeGrid",
    "datasets",
]
