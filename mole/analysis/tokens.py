"""Who worked on which token: one text, token by token, with the experts' weights under each.

Up to ten experts are drawn as stacked bars; more experts, or weights below 0, as rows of a heat map.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mole.analysis.record import CannotPlot, RunRecord
from mole.analysis.shares import PHASE_WORDS, are_shares
from mole.figure import FAINT, INK, colours, headline, new_figure, panel, shortened
from mole.routing.log_files import LoggedRouting, LoggedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, MAX_HEIGHT = 11.0, 36.0  # inches of the strip
LETTER, PADDING = 0.0765, 0.09  # a monospaced letter of 9 points; space beside a token
BAR, ROW, TEXT, GAP = 0.42, 0.13, 0.2, 0.2  # heights: stacked bar, row of a heat map, text, space below
BARS_UP_TO = 10
VISIBLE = {"\n": "↵", "\r": "␍", "\t": "→", " ": "·"}


@dataclass(frozen=True)
class TokensView:
    """Which text to show.

    `entry` counts the texts of the log: each logged forward is one, and each generate call; negative from the end.
    None: the first generated text, else the first evaluated one, else the last one of training. `row` is the row of
    its batch. `layer` is an index into the log's layers; None: the mean over all.
    """

    entry: int | None = None
    row: int = 0
    layer: int | None = None


@dataclass(frozen=True)
class Strip:
    """One text: the words of its T tokens, weights [T, E], and which tokens were generated."""

    words: list[str]
    weights: np.ndarray
    generated: np.ndarray


def draw_tokens(record: RunRecord, view: TokensView) -> Figure:
    """The token-by-token strip of one text. Raises ValueError if the log has no such text, row or layer."""
    run = record.routing
    number, text = _chosen(run, view.entry)
    strip = _strip(run, text, number, view)
    experts = run.expert_names
    stacked = len(experts) <= BARS_UP_TO and strip.weights.min() >= 0
    body = BAR if stacked else ROW * len(experts)
    lines = _lines([_width(word) for word in strip.words])
    shown = lines[: max(1, int(MAX_HEIGHT / (body + TEXT + GAP)))]
    count = shown[-1].stop
    height = len(shown) * (body + TEXT + GAP)
    figure = new_figure(WIDTH + 1.2, height + 1.2)
    axes = panel(figure, 0.5, 0.3, WIDTH, height)
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.axis("off")
    for index, line in enumerate(shown):
        top = index * (body + TEXT + GAP)
        _write(axes, strip, line, top)
        (_bars if stacked else _rows)(axes, strip, line, top + TEXT, experts)
    if stacked:
        _legend(axes, strip, experts)
    else:
        _colour_bar(figure, axes, strip, height)
    cut = f", the first {count:,} of {len(strip.words):,} tokens" if count < len(strip.words) else f", {count:,} tokens"
    both = strip.generated.any() and not strip.generated.all()
    colours_mean = " · grey: prompt, black: generated" if both else ""
    where = "mean over layers" if view.layer is None else f"layer {run.layer_names[view.layer]}"
    task = f" · task {text.task_names[view.row]}" if text.task_names else ""
    headline(
        axes,
        "Experts at work, token by token",
        f"{record.name} · text {number}, row {view.row} ({PHASE_WORDS[text.phase]}{cut}){task} · {where}{colours_mean}",
    )
    return figure


# ---- what is shown
def _chosen(run: LoggedRun, entry: int | None) -> tuple[int, LoggedRouting]:
    texts = run.sequences()
    if entry is None:
        first = {text.phase: index for index, text in reversed(list(enumerate(texts)))}
        entry = first.get("prefill", first.get("decode", first.get("eval", len(texts) - 1)))
    if not -len(texts) <= entry < len(texts):
        raise ValueError(f"entry={entry}: the routing log has {len(texts)} texts, 0 … {len(texts) - 1}")
    return entry % len(texts), texts[entry]


def _strip(run: LoggedRun, text: LoggedRouting, number: int, view: TokensView) -> Strip:
    rows, layers = len(text.mask), len(run.layer_names)
    if not 0 <= view.row < rows:
        raise ValueError(f"row={view.row}: text {number} has {rows} rows, 0 … {rows - 1}")
    if view.layer is not None and not 0 <= view.layer < layers:
        raise ValueError(f"layer={view.layer}: the routing log has {layers} layers, 0 … {layers - 1}")
    if text.tokens is None:
        raise CannotPlot("the routing log has no token ids, so there is no text to show")
    valid = text.mask[view.row]
    if not valid.any():
        raise ValueError(f"row={view.row}: that row of text {number} is padding only")
    weights = np.asarray(text.weights[view.row][valid], dtype=np.float64)
    texts = text.texts[view.row] if text.texts is not None else [str(token) for token in text.tokens[view.row]]
    words = [visible(word) for word, is_valid in zip(texts, valid, strict=True) if is_valid]
    phases = np.array(text.phases)[valid]
    return Strip(words, weights.mean(1) if view.layer is None else weights[:, view.layer], phases == "decode")


def visible(word: str) -> str:
    """A token's text with its spaces, line ends and control characters made visible."""
    if not word:
        return "∅"
    shown = "".join(
        VISIBLE.get(c) or (c if unicodedata.category(c)[0] not in "CZ" else f"\\u{ord(c):04x}") for c in word
    )
    return shortened(shown, 40)


def _width(word: str) -> float:
    letters = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in word)
    return max(letters, 2) * LETTER + PADDING


def _lines(widths: Sequence[float]) -> list[range]:
    """Tokens in lines no wider than the strip; a token alone may be wider."""
    lines, start, used = [], 0, 0.0
    for index, width in enumerate(widths):
        if used + width > WIDTH and index > start:
            lines.append(range(start, index))
            start, used = index, 0.0
        used += width
    return [*lines, range(start, len(widths))]


# ---- drawing
def _edges(strip: Strip, line: range) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum([_width(strip.words[index]) for index in line])])


def _write(axes: Axes, strip: Strip, line: range, top: float) -> None:
    edges = _edges(strip, line)
    prompt = FAINT if strip.generated.any() else INK
    for index, left, right in zip(line, edges, edges[1:], strict=False):
        axes.text((left + right) / 2, top + TEXT * 0.72, strip.words[index], ha="center", va="baseline", fontsize=9,
                  family="DejaVu Sans Mono", color=INK if strip.generated[index] else prompt)  # fmt: skip
    axes.text(-0.08, top + TEXT * 0.72, f"{line.start}", ha="right", va="baseline", fontsize=7, color=FAINT)


def _bars(axes: Axes, strip: Strip, line: range, top: float, experts: Sequence[str]) -> None:
    """Stacked from below; the full height is 1, or the largest sum if that is more."""
    edges, weights = _edges(strip, line), strip.weights[line.start : line.stop]
    scale = BAR / max(1.0, float(strip.weights.sum(1).max()))
    base = np.full(len(line), top + BAR)
    axes.barh([top + BAR / 2] * len(line), np.diff(edges) - 0.03, BAR, edges[:-1] + 0.015, color="#f2f2f2")
    for expert, colour in enumerate(colours(len(experts))):
        heights = weights[:, expert] * scale
        axes.bar(edges[:-1] + 0.015, -heights, np.diff(edges) - 0.03, base, align="edge", color=colour, linewidth=0)
        base = base - heights


def _limits(strip: Strip) -> tuple[float, float, str]:
    low, high = float(strip.weights.min()), float(strip.weights.max())
    if low < 0:
        return -max(-low, high), max(-low, high), "RdBu_r"
    return 0.0, max(high, 1e-9), "viridis"


def _rows(axes: Axes, strip: Strip, line: range, top: float, experts: Sequence[str]) -> None:
    low, high, colours_of = _limits(strip)
    rows = top + ROW * np.arange(len(experts) + 1)
    axes.pcolormesh(_edges(strip, line), rows, strip.weights[line.start : line.stop].T, cmap=colours_of, vmin=low,
                    vmax=high, edgecolor="white", linewidth=0.4)  # fmt: skip
    for expert, name in enumerate(experts):
        axes.text(-0.08, rows[expert] + ROW / 2, shortened(name, 28), ha="right", va="center", fontsize=6, color=INK)


def _legend(axes: Axes, strip: Strip, experts: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    means = strip.weights.mean(0)
    form = "{:.0%}" if are_shares(strip.weights) else "{:.2f}"
    handles = [
        Patch(color=colour, label=f"{shortened(name)}  {form.format(mean)}")
        for name, colour, mean in zip(experts, colours(len(experts)), means, strict=True)
    ]
    widest = max(len(str(handle.get_label())) for handle in handles) * 0.085 + 0.6
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), ncols=max(1, min(5, int(WIDTH / widest))),
                frameon=False, fontsize=9, handlelength=1.2, borderaxespad=0,
                title="expert, and its mean weight in this text", alignment="left", title_fontsize=9)  # fmt: skip


def _colour_bar(figure: Figure, axes: Axes, strip: Strip, height: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high, colours_of = _limits(strip)
    place = panel(figure, 0.5 + WIDTH + 0.15, 0.3 + max(0.0, height - 3.0), 0.15, min(height, 3.0))
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), colours_of), cax=place)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("weight", fontsize=9, color=INK)
