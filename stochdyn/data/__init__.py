"""Data: irregular, ragged and masked series, sequences of jumps, and the grid on which their paths live."""

from stochdyn.data import datasets
from stochdyn.data.covariates import AbstractInterpolation, Carried, LinearInterpolation
from stochdyn.data.doses import Dose, Doses
from stochdyn.data.grid import TimeGrid
from stochdyn.data.jumps import Jumps
from stochdyn.data.population import AbstractPopulation
from stochdyn.data.series import Series

__all__ = [
    "AbstractInterpolation",
    "AbstractPopulation",
    "Carried",
    "Dose",
    "Doses",
    "Jumps",
    "LinearInterpolation",
    "Series",
    "TimeGrid",
    "datasets",
]
