"""What all pictures share: figures without global state, colours, text that any font can show, PNG files.

matplotlib is imported when the first figure is made. Nothing here goes through pyplot or changes rcParams, and the same
figure gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 140
INK, FAINT, LINE = "#222222", "#777777", "#d0d0d0"
FALLBACK_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "Hiragino Sans", "Yu Gothic",
    "Noto Sans", "Noto Sans Arabic", "Noto Sans Devanagari", "Arial Unicode MS",
)  # fmt: skip
UNKNOWN_GLYPH = "□"


class MissingExtra(ValueError):
    """An optional package is not installed."""


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of that size in inches. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("plots need matplotlib, which is not installed: pip install 'mole-experts[plot]'") from None
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the figure's lower left corner."""
    total_width, total_height = figure.get_size_inches()
    place = (left / total_width, bottom / total_height, width / total_width, height / total_height)
    axes = figure.add_axes(place)
    axes.tick_params(labelsize=9, color=LINE, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    return axes


def headline(axes: Axes, title: str, subtitle: str) -> None:
    """Title and subtitle above the axes, from their left edge."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "left", "va": "bottom"}
    axes.annotate(title, (0, 1), (0, 24), fontsize=13, fontweight="bold", color=INK, **place)
    axes.annotate(subtitle, (0, 1), (0, 9), fontsize=9, color=FAINT, **place)


def colours(count: int) -> list[tuple[float, float, float]]:
    """That many colours, told apart as well as so many can be."""
    from matplotlib import colormaps

    if count <= 10:
        table = np.array(colormaps["tab10"].colors)[:count]  # type: ignore[attr-defined]
    elif count <= 20:
        table = np.array(colormaps["tab20"].colors)[:count]  # type: ignore[attr-defined]
    else:
        table = colormaps["turbo"](np.linspace(0.03, 0.97, count))[:, :3]
    return [(float(r), float(g), float(b)) for r, g, b in table]


def shortened(name: str, longest: int = 36) -> str:
    """A long name without its middle."""
    if len(name) <= longest:
        return name
    tail = longest // 2
    return f"{name[: longest - tail - 1]}…{name[-tail:]}"


def without_common_start(names: Sequence[str]) -> tuple[str, list[str]]:
    """The dotted beginning that all names share, and what is left of each: ("model.layers", ["0.q_proj", …])."""
    parts = [name.split(".") for name in names]
    common = 0
    if len(parts) > 1:
        while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
            common += 1
    return ".".join(parts[0][:common]), [".".join(p[common:]) for p in parts]


def png(figure: Figure) -> bytes:
    """The figure as a PNG, cut to what is drawn; no version or date in it."""
    return picture(figure, "png")


def picture(figure: Figure, kind: str) -> bytes:
    """The figure as a file of that kind (png, svg, pdf)."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar sign in a name is a dollar sign
        if not text.get_text().isascii():
            family = text.get_fontfamily()[0]
            text.set_text(showable(text.get_text(), family))
            text.set_fontfamily([name for name, _ in _fonts(family)])
    buffer = io.BytesIO()
    undated = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}[kind]
    figure.savefig(buffer, format=kind, dpi=DPI, bbox_inches="tight", pad_inches=0.15, metadata={undated: None})
    return buffer.getvalue()


def showable(text: str, family: str = "sans") -> str:
    """The text with a box for each character that no font at hand has: matplotlib would warn of each."""
    if text.isascii():
        return text
    fonts = _fonts(family)
    return "".join(c if c == "\n" or any(has(c) for _, has in fonts) else UNKNOWN_GLYPH for c in text)


def _fonts(family: str) -> list[tuple[str, Any]]:
    from matplotlib import font_manager

    first = "DejaVu Sans Mono" if "mono" in family.lower() else "DejaVu Sans"
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    found = []
    for name in (first, "DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)):
        font = font_manager.get_font(font_manager.findfont(name))
        found.append((name, lambda character, font=font: font.get_char_index(ord(character)) != 0))
    return found
