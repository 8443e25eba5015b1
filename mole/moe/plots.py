"""Pictures of loads: how many tokens each expert got, in all and by position. Figures are returned, never shown."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mole.figure import FAINT, INK, LINE, colours, new_figure, panel, png, shortened
from mole.moe.block import MoEBlock

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOLE, NULL = "#9a9a9a", {"zero": "hole (zero)", "identity": "identity", "constant": "constant"}
ACROSS = 4  # experts beside one another
WIDTH, HEIGHT = 2.6, 1.5  # inches of one of them


def display_experts_load(
    block_or_title: MoEBlock | str, loads: Any = None, *, names: Sequence[str] | None = None, show: bool = False
) -> Figure:
    """Tokens that each expert got at each position: bars, one axis per expert, one scale for all.

    `loads` [E', T], counts; None: those of the block's latest forward. `names` of the experts, where a title is given.
    Raises ValueError for loads of another shape, RuntimeError before a forward, MissingExtra without matplotlib.
    """
    title, counts, labels, nulls = _given(block_or_title, loads, names)
    if counts.ndim != 2:
        raise ValueError(f"loads are counts [experts, positions], got {list(counts.shape)}")
    figure = draw_loads(counts, labels, title, f"{int(counts.sum()):,} slots by position", nulls=nulls)
    return shown_if(figure, show)


def display_abs_experts_load(
    block_or_title: MoEBlock | str, loads: Any = None, *, names: Sequence[str] | None = None, show: bool = False
) -> Figure:
    """Tokens that each expert got in all: one bar per expert, with its share; the null experts in grey.

    `loads` [E'] or [E', T]; the rest as of `display_experts_load`.
    """
    title, counts, labels, nulls = _given(block_or_title, loads, names)
    counts = counts.sum(1) if counts.ndim == 2 else counts
    if counts.ndim != 1:
        raise ValueError(f"loads are counts [experts] or [experts, positions], got {list(counts.shape)}")
    return shown_if(draw_totals(counts, labels, title, f"{int(counts.sum()):,} slots", nulls=nulls), show)


def title_of(block: MoEBlock) -> str:
    """What a block is called in pictures: its label."""
    label = block.layer_id
    if label is None:
        return type(block).__name__
    return f"{type(block).__name__} {label}" if isinstance(label, int) else str(label)


def labels_of(block: MoEBlock) -> list[str]:
    """What its experts are called there: `expert 0`, …, then the null ones."""
    real, names = len(block.experts), block.choice_names
    return [f"expert {name}" if index < real else NULL.get(name, name) for index, name in enumerate(names)]


def palette(count: int, nulls: int) -> list[Any]:
    """A colour for each expert; the last `nulls` are grey."""
    return [*colours(count - nulls), *[HOLE] * nulls]


def _given(
    block_or_title: MoEBlock | str, loads: Any, names: Sequence[str] | None
) -> tuple[str, np.ndarray, list[str], int]:
    if isinstance(block_or_title, MoEBlock):
        block = block_or_title
        labels = list(names) if names is not None else labels_of(block)
        counts, title, nulls = block.experts_load() if loads is None else loads, title_of(block), len(labels)
        nulls -= len(block.experts)
    else:
        if loads is None:
            raise ValueError("loads are missing: a title alone has none; give loads, or a block")
        counts, title, nulls = loads, str(block_or_title), 0
        labels = list(names) if names is not None else []
    array = np.asarray(counts.detach().cpu() if hasattr(counts, "detach") else counts)
    labels = labels or [f"expert {index}" for index in range(len(array))]
    if len(labels) != len(array):
        raise ValueError(f"loads of {len(array)} experts, and {len(labels)} experts: {', '.join(labels)}")
    return title, array, labels, nulls


def shown_if(figure: Figure, show: bool) -> Figure:
    """The figure; in a window too, if `show`."""
    if show:
        from PIL import Image  # matplotlib needs it, so it is there

        Image.open(io.BytesIO(png(figure))).show()
    return figure


# ---- drawing
def draw_loads(
    counts: np.ndarray,
    labels: Sequence[str],
    title: str,
    subtitle: str,
    *,
    nulls: int = 0,
    unit: str = "tokens",
    ticks: Sequence[str] | None = None,
    x_label: str = "position",
    nulls_across: int | None = None,
) -> Figure:
    """A figure of `counts` [rows, columns], one axis per row: experts by position, whose last `nulls` are null ones.

    Or layers by expert: `ticks` name the columns, of which the last `nulls_across` are null ones.
    """
    experts, positions = counts.shape
    across = min(ACROSS, experts)
    down = -(-experts // across)
    step_x, step_y = WIDTH + 0.25, HEIGHT + 0.42
    top = down * step_y + 0.35
    figure = new_figure(across * step_x + 0.75, top + 0.75)
    most = max(float(counts.max(initial=0)), 1e-9)
    shades = palette(experts, nulls) if nulls_across is None else [palette(positions, nulls_across)] * experts
    for expert, colour in enumerate(shades):
        row, column = divmod(expert, across)
        axes = panel(figure, 0.65 + column * step_x, top - (row + 1) * step_y + 0.2, WIDTH, HEIGHT)
        axes.bar(np.arange(positions), counts[expert], width=1.0 if positions > 40 else 0.85, color=colour, linewidth=0)
        axes.set_xlim(-0.5, max(positions, 1) - 0.5)
        axes.set_ylim(0, most * 1.05)
        share = counts[expert].sum() / max(float(counts.sum()), 1e-9)
        name = shortened(labels[expert], 20) + (f"  {share:.1%}" if nulls_across is None else "")
        axes.set_title(name, fontsize=9.5, loc="left", color=INK, pad=4)
        _plain(axes, whole_x=ticks is None)
        if ticks is not None:
            axes.set_xticks(range(positions), ticks)
        if column:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel(unit, fontsize=9, color=INK)
        if expert + across < experts:
            axes.tick_params(labelbottom=False)
        else:
            axes.set_xlabel(x_label, fontsize=9, color=INK)
    head(figure, title, subtitle)
    return figure


def draw_totals(
    counts: np.ndarray, labels: Sequence[str], title: str, subtitle: str, *, nulls: int = 0, unit: str = "tokens"
) -> Figure:
    """A figure of `counts` [E'], with a line at the even share of the real experts."""
    experts = len(counts)
    each = 1.0 if experts <= 10 else 0.75 if experts <= 16 else 0.42
    width = max(3.6, each * experts)
    figure = new_figure(width + 1.25, 3.9)
    axes = panel(figure, 0.75, 0.75, width, 2.3)
    bars = axes.bar(np.arange(experts), counts, width=0.8, color=palette(experts, nulls), linewidth=0)
    total = max(float(counts.sum()), 1e-9)
    texts = axes.bar_label(bars, [f"{count / total:.1%}" for count in counts], padding=2, color=INK, zorder=5,
                           fontsize=8 if experts <= 16 else 6.5)  # fmt: skip
    for text in texts:  # readable where the line of the even share passes
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    real = experts - nulls
    even = float(counts[:real].sum()) / max(real, 1)
    axes.axhline(even, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    axes.annotate("even", (1, even), (3, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                  fontsize=8, color=FAINT, va="center")  # fmt: skip
    turned = max(len(label) for label in labels) * 0.085 > width / experts
    axes.set_xticks(range(experts), [shortened(label, 20) for label in labels], rotation=40 if turned else 0,
                    ha="right" if turned else "center", rotation_mode="anchor" if turned else "default")  # fmt: skip
    axes.set_ylim(0, max(float(counts.max(initial=0)), even, 1e-9) * 1.12)
    axes.set_xlim(-0.6, experts - 0.4)
    axes.set_ylabel(unit, fontsize=9, color=INK)
    _plain(axes, whole_x=False)
    head(figure, title, subtitle)
    return figure


def _plain(axes: Axes, *, whole_x: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    if whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(axis="x", length=0 if not whole_x else 2)
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)


def head(figure: Figure, title: str, subtitle: str) -> None:
    """Title and what it is of, at the upper left corner of the figure."""
    width, height = figure.get_size_inches()
    room = math.floor(width / 0.115)
    figure.text(0.2 / width, 1 - 0.3 / height, shortened(title, max(room, 12)), fontsize=13, fontweight="bold",
                color=INK, va="center")  # fmt: skip
    figure.text(0.2 / width, 1 - 0.53 / height, subtitle, fontsize=9, color=FAINT, va="center")
