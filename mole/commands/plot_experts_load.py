"""`mole plot experts-load`: how many tokens each expert got, from a run's routing log alone."""

from typing import Annotated, Literal

from pydantic import Field

from mole.analysis.experts_load import plot_experts_load
from mole.registry import config_dataclass


@config_dataclass
class PlotExpertsLoad:
    """Which run, which layers, which kind of file."""

    run: str
    layer: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    format: Literal["png", "svg", "pdf"] = "png"
    to: str | None = None


def run(config: PlotExpertsLoad) -> None:
    """Draws the plots and prints the files that it wrote."""
    layer = None if config.layer == "all" else int(config.layer)
    for path in plot_experts_load(config.run, layer, config.to, config.format):
        print(path)
