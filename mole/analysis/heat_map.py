"""A heat map of weights, rows by experts: sizes, labels, numbers and colour bar for a few cells as for thousands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mole.figure import INK, headline, new_figure, panel, shortened, showable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERS_UP_TO = 1000  # cells; more would not be legible
LETTER = 0.085  # inches that a letter of a label takes


@dataclass(frozen=True)
class Words:
    """What stands around a heat map."""

    title: str
    subtitle: str
    x_label: str
    y_label: str
    scale: str = "mean weight"


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], words: Words, is_share: bool) -> Figure:
    """A figure of `values` [rows, columns]: shares in per cent, or plain mean weights."""
    height_of_row = 0.36 if len(rows) <= 20 else 0.22 if len(rows) <= 80 else 0.13
    width_of_column = 0.78 if len(columns) <= 12 else 0.5
    # A narrow map under a wide title looks lost, and a low one leaves no room for the colour bar.
    width = max(4.2, width_of_column * len(columns))
    height = max(1.1, height_of_row * len(rows))
    figure = new_figure(width + 1.4, height + 1.2)
    axes = panel(figure, 0.3, 0.3, width, height)
    shown = values * 100 if is_share else values
    low, high = min(0.0, float(shown.min())), max(float(shown.max()), 1e-9)
    if is_share:  # an even share is the middle of the scale, not its top
        high = max(high, min(100.0, 200.0 / len(columns)))
    if low < 0:
        low, high = -max(-low, high), max(-low, high)
    image = axes.imshow(shown, aspect="auto", cmap="RdBu_r" if low < 0 else "viridis", vmin=low, vmax=high,
                        interpolation="nearest")  # fmt: skip
    _label(axes, rows, columns, width / len(columns), words)
    if values.size <= NUMBERS_UP_TO:
        _number(axes, shown, (low, high), "{:.0f}" if is_share else "{:.2f}")
    bar_height = min(height, 4.0)
    bar = figure.colorbar(image, cax=panel(figure, 0.3 + width + 0.18, 0.3 + height - bar_height, 0.16, bar_height))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("share (%)" if is_share else words.scale, fontsize=9, color=INK)
    headline(axes, words.title, words.subtitle)
    return figure


def _label(axes: Axes, rows: Sequence[str], columns: Sequence[str], width_of_column: float, words: Words) -> None:
    names = [showable(shortened(name)) for name in columns]  # here, as an axis sets its labels anew
    turned = max(len(name) for name in names) * LETTER > width_of_column
    axes.set_xticks(range(len(names)), names, rotation=40 if turned else 0, ha="right" if turned else "center",
                    rotation_mode="anchor" if turned else "default")  # fmt: skip
    every = max(1, -(-len(rows) // 250))
    shown = range(0, len(rows), every)
    axes.set_yticks(
        shown, [showable(shortened(rows[row], 44)) for row in shown], fontsize=9 if len(rows) <= 80 else 6.5
    )
    axes.tick_params(length=0)
    axes.set_xlabel(words.x_label, fontsize=10, color=INK)
    axes.set_ylabel(words.y_label, fontsize=10, color=INK)
    axes.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2 if len(rows) <= 20 else 0.5)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _number(axes: Axes, values: np.ndarray, limits: tuple[float, float], form: str) -> None:
    low, high = limits
    for (row, column), value in np.ndenumerate(values):
        place = (value - low) / (high - low)
        light = 0.2 < place < 0.8 if low < 0 else place > 0.6
        number = form.format(round(float(value), 2) + 0.0)  # never "-0.00"
        axes.text(column, row, number, ha="center", va="center", fontsize=8.5 if len(values) <= 20 else 7,
                  color="black" if light else "white")  # fmt: skip
