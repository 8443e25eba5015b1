"""`mole plot`: pictures of a run from its logs alone."""

from typing import Literal

from pydantic import Field

from mole.analysis import TokensView, plot_run
from mole.registry import config_dataclass


@config_dataclass
class Plot:
    """Which run, which plots, and which text the plot `tokens` shows."""

    run: str
    plots: tuple[Literal["loss", "layers", "tasks", "tokens", "scores", "weights"], ...] | None = None
    to: str | None = None
    entry: int | None = None
    row: int = Field(default=0, ge=0)
    layer: int | None = Field(default=None, ge=0)


def run(config: Plot) -> None:
    """Draws the plots and prints the files that it wrote."""
    view = TokensView(entry=config.entry, row=config.row, layer=config.layer)
    for path in plot_run(config.run, config.plots, config.to, view).values():
        print(path)
