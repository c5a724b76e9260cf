"""What a fit is worth: importance weights, trees for ArviZ, plots."""

from stochdyn.diagnostics.arviz import to_arviz, to_inference_data
from stochdyn.diagnostics.importance import ParetoK, Summary, SummaryRow, pareto_k, psis_weights, summarise
from stochdyn.diagnostics.plots import plot_forecast, plot_losses, plot_phase
from stochdyn.diagnostics.tree import Variable, build_tree

__all__ = [
    "ParetoK",
    "Summary",
    "SummaryRow",
    "Variable",
    "build_tree",
    "pareto_k",
    "plot_forecast",
    "plot_losses",
    "plot_phase",
    "psis_weights",
    "summarise",
    "to_arviz",
    "to_inference_data",
]
