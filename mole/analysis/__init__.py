"""Pictures of a run, from what it left in its folder alone: no model, no tokenizer, no data."""

from mole.analysis.comparison import draw_comparison
from mole.analysis.plots import PLOT_NAMES, CannotPlot, plot_run
from mole.analysis.tokens import TokensView
from mole.analysis.weights import get_latest_log
from mole.figure import MissingExtra

__all__ = ["PLOT_NAMES", "CannotPlot", "MissingExtra", "TokensView", "draw_comparison", "get_latest_log", "plot_run"]
