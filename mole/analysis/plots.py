"""The plots by name, and the one call that draws them for a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mole.analysis.layers import draw_layers
from mole.analysis.loss import draw_loss
from mole.analysis.record import CannotPlot, RunRecord
from mole.analysis.scores import draw_scores
from mole.analysis.tasks import draw_tasks
from mole.analysis.tokens import TokensView, draw_tokens
from mole.analysis.weights_figures import draw_logged
from mole.figure import png
from mole.registry import unknown
from mole.run_folder import write_atomically

PLOT_NAMES = ("loss", "layers", "tasks", "tokens", "scores", "weights")


def plot_run(
    folder: str | Path,
    plots: Sequence[str] | None = None,
    to: str | Path | None = None,
    tokens: TokensView | None = None,
) -> dict[str, Path]:
    """Draws plots of the run in `folder` as PNG files into `to` (None: its plots/); returns name → file.

    `plots` None: every one that the run's logs allow. `tokens` says which text the plot of that name shows. Nothing is
    written unless all can be drawn. Raises ValueError if a plot is not known, one that was asked for cannot be drawn
    (`CannotPlot`), nothing can be drawn, or a log is damaged; MissingExtra without matplotlib.
    """
    for name in plots if plots is not None else ():
        if name not in PLOT_NAMES:
            raise ValueError(unknown("plot", name, PLOT_NAMES))
    if plots is not None and not plots:
        raise ValueError(f"no plot was asked for; known: {', '.join(PLOT_NAMES)}")
    record = RunRecord(folder)
    draw: dict[str, Callable[[RunRecord], Any]] = {
        "loss": draw_loss,
        "layers": draw_layers,
        "tasks": draw_tasks,
        "tokens": lambda record: draw_tokens(record, tokens or TokensView()),
        "scores": draw_scores,
        "weights": draw_logged,
    }
    pictures: dict[str, bytes] = {}
    impossible: dict[str, str] = {}
    for name in plots if plots is not None else PLOT_NAMES:
        try:
            pictures[name] = png(draw[name](record))
        except CannotPlot as error:
            impossible[name] = str(error)
    if impossible and (plots is not None or not pictures):
        lines = [f"{name}: {reason}" for name, reason in impossible.items()]
        raise CannotPlot("\n".join([f"{len(lines)} plot(s) cannot be drawn", *lines]))
    target = record.folder.plots if to is None else Path(to)
    files = {name: target / f"{name}.png" for name in pictures}
    for name, picture in pictures.items():
        write_atomically(files[name], picture)
    return files
