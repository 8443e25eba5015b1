"""A map of a library: experts that change the backbone alike lie near each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mole.figure import FAINT, INK, LINE, colours, headline, new_figure, panel, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 6.5
MOST_NAMES = 80  # more would hide the points


def draw_map(title: str, places: Sequence[Sequence[float]], names: Sequence[str], clusters: Sequence[int]) -> Figure:
    """One point for each expert at its place in the plane, coloured by cluster. Raises MissingExtra."""
    figure = new_figure(SIZE + 1.6, SIZE + 1.4)
    axes = panel(figure, 0.8, 0.6, SIZE, SIZE)
    groups = len(set(clusters))
    told = f"{len(names)} experts in {groups} cluster{'' if groups == 1 else 's'}, by the cosines of their updates"
    headline(axes, shortened(title, 60), told)
    tints = colours(max(clusters, default=0) + 1)
    axes.axhline(0, color=LINE, linewidth=0.8, zorder=0)
    axes.axvline(0, color=LINE, linewidth=0.8, zorder=0)
    axes.scatter([x for x, _ in places], [y for _, y in places], c=[tints[c] for c in clusters], s=36, zorder=2)
    axes.margins(0.12)
    middle = sum((min(column), max(column))) / 2 if (column := [x for x, _ in places]) else 0.0
    if len(names) <= MOST_NAMES:
        for (x, y), name in zip(places, names, strict=True):
            axes.annotate(
                shortened(name),
                (x, y),
                (5, 4) if x <= middle else (-5, 4),  # towards the middle: a name never runs out of the frame
                ha="left" if x <= middle else "right",
                textcoords="offset points",
                fontsize=8,
                color=INK,
                annotation_clip=False,
            )
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("first direction", fontsize=9, color=FAINT)
    axes.set_ylabel("second direction", fontsize=9, color=FAINT)
    return figure
