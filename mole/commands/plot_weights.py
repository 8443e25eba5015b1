"""`mole plot weights`: the weight of each expert over a run's training, from what it logged, also while it runs."""

from pathlib import Path
from typing import Any, Literal

from mole.analysis.record import RunRecord
from mole.analysis.weights import ALL, MEAN, WeightHistory, history_of, weights_csv
from mole.analysis.weights_figures import draw_final_weights, draw_weight_sets, draw_weights
from mole.analysis.weights_html import weights_page
from mole.figure import picture
from mole.registry import config_dataclass
from mole.run_folder import write_atomically

NAME = "weights"


@config_dataclass
class PlotWeights:
    """Which run, which of its sites, over what, which kind of file."""

    run: str
    layers: str = MEAN
    x: Literal["step", "epoch"] = "step"
    format: Literal["png", "svg", "pdf", "html", "csv"] = "png"
    to: str | None = None


def run(config: PlotWeights) -> None:
    """Draws the plots and prints the files that it wrote. Nothing is written unless all can be drawn."""
    record = RunRecord(config.run)
    history = history_of(record)
    layer = None if config.layers in (MEAN, ALL) else history.index_of(config.layers)
    name = NAME if layer is None else f"{NAME}-{config.layers}"
    if config.format == "csv":
        names = history.layers if config.layers == ALL else [config.layers]
        indices = {one: None if one == MEAN else history.index_of(one) for one in names}
        files: dict[str, str | bytes] = {f"{name}.csv": weights_csv(history, indices)}
    elif config.format == "html":
        files = {f"{name}.html": weights_page(history, config.x, layer, every_set=config.layers == ALL)}
    else:
        figures = _figures(history, config, name, layer)
        files = {f"{one}.{config.format}": picture(figure, config.format) for one, figure in figures.items()}
    target = record.folder.plots if config.to is None else Path(config.to)
    for file, content in files.items():
        write_atomically(target / file, content)
        print(target / file)


def _figures(history: WeightHistory, config: PlotWeights, name: str, layer: int | None) -> dict[str, Any]:
    """Name of a file → its figure. Where all sites share one set, their mean is all that there is."""
    figures = {name: draw_weights(history, config.x, layer)}
    if config.layers == ALL and history.num_sets > 1:
        figures[f"{NAME}-sets"] = draw_weight_sets(history, config.x)
        figures[f"{NAME}-final"] = draw_final_weights(history)
    return figures
