"""Rows of a table side by side: the mean of each as a bar, its tasks as dots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from mole.figure import FAINT, INK, LINE, colours, headline, new_figure, panel, png, shortened
from mole.run_folder import write_atomically


class Scores(Protocol):
    """A table: rows, tasks, values."""

    @property
    def metric(self) -> str: ...
    @property
    def higher_is_better(self) -> bool | None: ...
    @property
    def rows(self) -> Mapping[str, Mapping[str, float]]: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    def value(self, row: str, task: str) -> float | None: ...
    def mean(self, row: str) -> float | None: ...


def draw_comparison(table: Scores, path: Path) -> Path:
    """Writes the picture, best row on top as the table has them; returns `path`. Raises MissingExtra."""
    names = list(table.rows)
    height = 0.32 * len(names) + 0.2
    figure = new_figure(9.0, height + 1.5)
    axes = panel(figure, 2.2, 0.6, 6.4, height)
    places = range(len(names))
    means = [table.mean(name) for name in names]
    axes.barh(places, [0.0 if m is None or not math.isfinite(m) else m for m in means], color=LINE, height=0.7)
    for task, colour in zip(table.tasks, colours(len(table.tasks)), strict=True):
        points = [(table.value(name, task), place) for place, name in enumerate(names)]
        shown = [(x, y) for x, y in points if x is not None and math.isfinite(x)]
        axes.scatter([x for x, _ in shown], [y for _, y in shown], color=colour, s=26, label=shortened(task), zorder=3)
    right = axes.get_xlim()[1]
    for place, mean in enumerate(means):
        text = "–" if mean is None else f"{mean:.3f}"
        axes.text(right * 1.01, place, text, va="center", fontsize=9, color=INK)
    axes.set_yticks(list(places), [shortened(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, right)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35 / height), ncol=5, frameon=False, fontsize=9)
    better = "higher" if table.higher_is_better else "lower"
    headline(axes, f"{table.metric.replace('_', ' ')} by task", f"bar and number: mean over tasks · {better} is better")
    axes.tick_params(axis="y", length=0, colors=INK)
    axes.tick_params(axis="x", colors=FAINT)
    write_atomically(path, png(figure))
    return path
