"""What all plots share; it lies in the foundation, as what stands right of analysis draws too."""

from mole.figure import (
    DPI,
    FAINT,
    INK,
    LINE,
    MissingExtra,
    colours,
    headline,
    new_figure,
    panel,
    png,
    shortened,
    showable,
    without_common_start,
)

__all__ = [
    "DPI",
    "FAINT",
    "INK",
    "LINE",
    "MissingExtra",
    "colours",
    "headline",
    "new_figure",
    "panel",
    "png",
    "shortened",
    "showable",
    "without_common_start",
]
