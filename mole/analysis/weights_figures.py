"""Weights over training as pictures: lines with the final values beside, a sheet of all sets, a heat map of the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mole.analysis.heat_map import Words, heat_map
from mole.analysis.record import RunRecord
from mole.analysis.shares import are_shares
from mole.analysis.weights import Axis, WeightHistory, layer_name, logged_history
from mole.figure import (
    FAINT,
    INK,
    LINE,
    colours,
    headline,
    new_figure,
    panel,
    shortened,
    showable,
    without_common_start,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 40  # branches with a colour and a bar; further ones are thin grey lines
BANDS_UP_TO = 8  # branches whose spread over the sets is shown; more would hide each other
BASE = "base"  # the backbone's own branch, which is no expert: black
WIDTH, BARS, LETTER = 6.4, 2.3, 0.078  # inches: lines, bars, a letter of a name
SMALL_WIDTH, SMALL_HEIGHT, BETWEEN, ABOVE = 2.0, 1.25, 0.16, 0.3  # of the sheet


def draw_logged(record: RunRecord) -> Figure:
    """The mean over all sites, of a run with a log of weights. Raises CannotPlot without one."""
    return draw_weights(logged_history(record))


def draw_weights(history: WeightHistory, axis: Axis = "step", layer: int | None = None) -> Figure:
    """A line for each branch, of one site or (None) the mean over all, and its final weight as a bar.

    Bands behind the lines of a mean go from the lowest to the highest of the sets. Raises CannotPlot for epochs that
    the log does not have, MissingExtra without matplotlib.
    """
    places, label = history.over(axis)
    values = history.of(layer)
    named = named_branches(values[-1])
    height = max(3.0, 0.25 * len(named))
    names = [shortened(history.branches[branch], 30) for branch in named]
    room = max(len(name) for name in names) * LETTER + 0.25
    figure = new_figure(0.8 + WIDTH + room + BARS + 0.9, height + 1.3)
    axes = panel(figure, 0.8, 0.6, WIDTH, height)
    bands = layer is None and history.num_sets > 1 and len(history.branches) <= BANDS_UP_TO
    _draw_lines(axes, places, values, tints_of(history, named), history.values if bands else None)
    _finish(axes, places, values if not bands else history.values)
    axes.set_xlabel(label, fontsize=10, color=INK)
    axes.set_ylabel("weight", fontsize=10, color=INK)
    _draw_bars(panel(figure, 0.8 + WIDTH + room, 0.6, BARS, height), values[-1], named, names, history)
    headline(axes, "Weights over training", subtitle(history, layer, mean=True, bands=bands))
    return figure


def draw_weight_sets(history: WeightHistory, axis: Axis = "step") -> Figure:
    """A sheet with a small panel for each set of weights, all with the same axes. Raises as `draw_weights`."""
    places, label = history.over(axis)
    count, columns = history.num_sets, _columns(history.num_sets)
    rows = -(-count // columns)
    width, height = columns * (SMALL_WIDTH + BETWEEN), rows * (SMALL_HEIGHT + ABOVE)
    figure = new_figure(0.7 + width + 3.0, height + 1.3)
    named = named_branches(np.abs(history.values[-1]).max(0))
    tints = tints_of(history, named)
    for one in range(count):
        row, column = divmod(one, columns)
        bottom = 0.55 + height - (row + 1) * (SMALL_HEIGHT + ABOVE)
        axes = panel(figure, 0.7 + column * (SMALL_WIDTH + BETWEEN), bottom, SMALL_WIDTH, SMALL_HEIGHT)
        _draw_lines(axes, places, history.values[:, one], tints, width=1.3)
        _finish(axes, places, history.values, ticks=4)
        axes.tick_params(labelsize=8, labelleft=column == 0, labelbottom=one + columns >= count)
        axes.set_title(shortened(history.title_of(one), 31), fontsize=8, color=INK, loc="left", pad=4)
    across, up = figure.get_size_inches()
    words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 10, "color": INK}
    figure.text(0.15 / across, (0.55 + (height - ABOVE) / 2) / up, "weight", rotation=90, **words)
    figure.text((0.7 + (width - BETWEEN) / 2) / across, 0.15 / up, label, **words)
    _draw_legend(figure, (0.75 + width, 0.55 + height - ABOVE), history, named, tints)
    frame = panel(figure, 0.7, 0.55, width, height)
    frame.axis("off")
    headline(frame, "Weights over training, set by set", subtitle(history))
    return figure


def draw_final_weights(history: WeightHistory) -> Figure:
    """A heat map of every site's weights at the last moment. Raises MissingExtra without matplotlib."""
    values = np.nan_to_num(history.final())
    start, names = without_common_start(history.sites)
    rows = [f"{name} · {layer_name(index)}" for index, name in enumerate(names)]
    words = Words("Last weights, site by site", subtitle(history, greys=False), "branch",
                  f"site, under {start}" if start else "site", scale="weight")  # fmt: skip
    return heat_map(values, rows, history.branches, words, are_shares(values))


# ---- shared with the pages of HTML
def named_branches(final: np.ndarray) -> list[int]:
    """The branches that have a colour and a name: all, or those with the largest final weights [E]."""
    if len(final) <= MOST_NAMED:
        return list(range(len(final)))
    return sorted(np.argsort(-np.abs(np.nan_to_num(final)), kind="stable")[:MOST_NAMED].tolist())


def tints_of(history: WeightHistory, named: Sequence[int]) -> dict[int, str]:
    """Branch → colour, "#rrggbb". The plain backbone is black, and is drawn dashed."""
    from matplotlib.colors import to_hex

    experts = [branch for branch in named if history.branches[branch] != BASE]
    found = {branch: to_hex(colour) for branch, colour in zip(experts, colours(len(experts)), strict=True)}
    return {branch: found.get(branch, INK) for branch in named}


def subtitle(
    history: WeightHistory, layer: int | None = None, *, mean: bool = False, bands: bool = False, greys: bool = True
) -> str:
    """What a picture shows of which run: the sites, how far training has come, which branches are `greys` if any."""
    sites = f"{len(history.sites)} sites"
    if layer is not None:
        what = f"{layer_name(layer)}: {history.sites[layer]}"
    elif history.num_sets == 1:
        what = f"one set of weights for {sites}" if len(history.sites) > 1 else "one site"
    else:
        shared = sites if history.num_sets == len(history.sites) else f"{sites} in {history.num_sets} sets"
        what = f"mean over {shared}" if mean else shared
    what += " (bands: lowest to highest)" if bands else ""
    last = int(history.moments[-1])
    until = f"after step {last:,}" if history.of_steps else f"{last:,} logged training forwards"
    rest = len(history.branches) - MOST_NAMED
    grey = f" · the {rest} branches with the least weight in grey" if greys and rest > 0 else ""
    return f"{history.run} · {what} · {until}{grey}"


# ---- drawing
def _dashes(tint: str) -> Any:
    return (0, (4, 2)) if tint == INK else "-"


def _columns(count: int) -> int:
    """Panels beside each other: a sheet somewhat wider than high, with few empty places at its end."""
    least = max(2, round(math.sqrt(count)))
    return min(count, min(range(least, least + 3), key=lambda columns: (-count % columns, columns)))


def _draw_lines(
    axes: Axes, places: np.ndarray, values: np.ndarray, tints: dict[int, str], spread: np.ndarray | None = None,
    width: float = 1.8,
) -> None:  # fmt: skip
    """One line per column of `values` [N, E]; bands from the lowest to the highest of `spread` [N, G, E]."""
    marker = "o" if len(places) == 1 else None
    for branch in [*(branch for branch in range(values.shape[1]) if branch not in tints), *tints]:
        tint = tints.get(branch, LINE)
        if spread is not None:
            low, high = spread[:, :, branch].min(1), spread[:, :, branch].max(1)
            axes.fill_between(places, low, high, color=tint, alpha=0.1, linewidth=0)
        axes.plot(places, values[:, branch], color=tint, linewidth=width if branch in tints else 0.7, marker=marker,
                  linestyle=_dashes(tint))  # fmt: skip


def _finish(axes: Axes, places: np.ndarray, values: np.ndarray, ticks: int = 8) -> None:
    """The same limits for all panels that show parts of `values`: they start at 0, or below it where weights do."""
    finite = values[np.isfinite(values)]
    low, high = (min(0.0, float(finite.min())), float(finite.max())) if finite.size else (0.0, 1.0)
    space = 0.05 * max(high - low, 1e-3)
    axes.set_ylim(low - space if low < 0 else 0.0, high + space)
    first, last = float(places[0]), float(places[-1])
    beside = 0.02 * (last - first) or 1.0
    axes.set_xlim(first - beside, last + beside)
    axes.locator_params(axis="x", nbins=ticks, integer=bool((places == places.astype(int)).all()))
    if last == first:
        axes.set_xticks([first])
    axes.grid(color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_bars(
    axes: Axes, final: np.ndarray, named: Sequence[int], names: Sequence[str], history: WeightHistory
) -> None:
    tints = tints_of(history, named)
    lengths = np.nan_to_num(final[list(named)])
    rows = range(len(named))
    axes.barh(rows, lengths, color=[tints[branch] for branch in named], height=0.7)
    for row, branch in enumerate(named):
        axes.annotate(f"{final[branch]:.3f}", (max(float(lengths[row]), 0.0), row), (4, 0), fontsize=8.5, color=INK,
                      textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
    axes.set_yticks(rows, [showable(name) for name in names])  # here, as an axis sets its labels anew
    axes.set_ylim(max(len(named), 3) - 0.5, -0.5)
    axes.set_xlim(min(0.0, float(lengths.min())), max(float(lengths.max()), 1e-9))
    axes.locator_params(axis="x", nbins=3)
    axes.tick_params(axis="y", length=0, colors=INK)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("last weight", fontsize=10, color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_legend(
    figure: Figure, corner: tuple[float, float], history: WeightHistory, named: Sequence[int], tints: dict[int, str]
) -> None:
    """The names of the branches, their upper left corner at `corner` in inches."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=tints[branch], linewidth=2, linestyle=_dashes(tints[branch]),
               label=shortened(history.branches[branch], 30))
        for branch in named
    ]  # fmt: skip
    legend_columns = -(-len(named) // max(12, int(corner[1] / 0.16)))
    place = corner[0] / figure.get_figwidth(), corner[1] / figure.get_figheight()
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=place, frameon=False, labelcolor=FAINT,
                  borderaxespad=0, fontsize=9 if len(named) <= 12 else 7, ncols=legend_columns)  # fmt: skip
