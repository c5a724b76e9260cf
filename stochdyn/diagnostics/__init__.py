"""What a fit is worth: importance weights, trees for ArviZ, plots."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stochdyn.diagnostics.calibration import Calibration, sbc, tarp
from stochdyn.diagnostics.calibration_plot import plot_calibration
from stochdyn.diagnostics.coverage import Coverage
from stochdyn.diagnostics.diagnose import diagnose
from stochdyn.diagnostics.diagnosis import Diagnosis, LatentUse, Verdict
from stochdyn.diagnostics.diagnosis_plot import plot_diagnosis
from stochdyn.diagnostics.field_plot import plot_field, plot_fixed_points
from stochdyn.diagnostics.fields import FieldReading, PosteriorFields, posterior_fields, read_field
from stochdyn.diagnostics.fixed_points import FixedPoint, FixedPoints, fixed_points
from stochdyn.diagnostics.function_plot import plot_function
from stochdyn.diagnostics.importance import ParetoK, Summary, SummaryRow, pareto_k, psis_weights, summarise
from stochdyn.diagnostics.jumps import JumpReading, plot_jumps, read_jumps
from stochdyn.diagnostics.plots import plot_forecast, plot_losses, plot_phase
from stochdyn.diagnostics.rescaling import TimeRescaling, plot_time_rescaling, time_rescaling
from stochdyn.diagnostics.settling import Settling
from stochdyn.diagnostics.tree import Variable, build_tree
from stochdyn.diagnostics.two_sample import TwoSample, c2st

if TYPE_CHECKING:
    from stochdyn.diagnostics.arviz import to_arviz, to_inference_data

_LAZY = ("to_arviz", "to_inference_data")

__all__ = [
    "Calibration",
    "Coverage",
    "Diagnosis",
    "FieldReading",
    "FixedPoint",
    "FixedPoints",
    "JumpReading",
    "LatentUse",
    "ParetoK",
    "PosteriorFields",
    "Settling",
    "Summary",
    "SummaryRow",
    "TimeRescaling",
    "TwoSample",
    "Variable",
    "Verdict",
    "build_tree",
    "c2st",
    "diagnose",
    "fixed_points",
    "pareto_k",
    "plot_calibration",
    "plot_diagnosis",
    "plot_field",
    "plot_fixed_points",
    "plot_forecast",
    "plot_function",
    "plot_jumps",
    "plot_losses",
    "plot_phase",
    "plot_time_rescaling",
    "posterior_fields",
    "psis_weights",
    "read_field",
    "read_jumps",
    "sbc",
    "summarise",
    "tarp",
    "time_rescaling",
    "to_arviz",
    "to_inference_data",
]


def __getattr__(name: str) -> Any:
    """Load ArviZ, which takes seconds, at the first use only."""
    if name in _LAZY:
        return getattr(import_module("stochdyn.diagnostics.arviz"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
