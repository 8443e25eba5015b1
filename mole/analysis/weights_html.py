"""Weights over training as a page of HTML that can be moved about in; it loads nothing from elsewhere."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from mole.analysis.weights import Axis, WeightHistory, layer_name
from mole.analysis.weights_figures import BASE, named_branches, subtitle, tints_of
from mole.figure import LINE, MissingExtra

PIXELS = 100  # of an inch
SHEET_COLUMNS = 4


def weights_page(history: WeightHistory, axis: Axis = "step", layer: int | None = None, every_set: bool = False) -> str:
    """The page: lines and final weights of one site or (None) of the mean; with `every_set`, the sheet and the map.

    Raises MissingExtra without plotly, CannotPlot for epochs that the log does not have.
    """
    figures = [lines_figure(history, axis, layer)]
    if every_set and history.num_sets > 1:
        figures += [sets_figure(history, axis), final_figure(history)]
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=index == 0, div_id=f"weights-{index}")
        for index, figure in enumerate(figures)
    ]
    title = html.escape(f"{history.run}: weights over training")
    head = f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>{title}</title></head>\n<body>\n'
    return head + "\n".join(parts) + "\n</body></html>\n"


def lines_figure(history: WeightHistory, axis: Axis, layer: int | None) -> Any:
    """A plotly figure: a line for each branch, and the final weights as bars."""
    graph_objects, make_subplots = _plotly()
    places, label = history.over(axis)
    values = history.of(layer)
    named = named_branches(values[-1])
    tints = tints_of(history, named)
    figure = make_subplots(rows=1, cols=2, column_widths=[0.7, 0.3], horizontal_spacing=0.16)
    for branch, name in enumerate(history.branches):
        figure.add_trace(_line(graph_objects, places, values[:, branch], name, tints.get(branch), True), row=1, col=1)
    bars = graph_objects.Bar(
        x=values[-1, named].tolist(),
        y=[_text(history.branches[branch]) for branch in named],
        orientation="h",
        marker_color=[tints[branch] for branch in named],
        text=[f"{values[-1, branch]:.3f}" for branch in named],
        showlegend=False,
    )
    figure.add_trace(bars, row=1, col=2)
    figure.update_yaxes(autorange="reversed", row=1, col=2)
    figure.update_xaxes(title=label, row=1, col=1)
    figure.update_xaxes(title="last weight", row=1, col=2)
    figure.update_yaxes(title="weight", row=1, col=1)
    height = max(4.2, 0.25 * len(named) + 1.6)
    return _titled(figure, "Weights over training", subtitle(history, layer, mean=True), height)


def sets_figure(history: WeightHistory, axis: Axis) -> Any:
    """A plotly figure: a small panel for each set of weights, all with the same axes."""
    graph_objects, make_subplots = _plotly()
    places, label = history.over(axis)
    columns = min(SHEET_COLUMNS, history.num_sets)
    rows = -(-history.num_sets // columns)
    titles = [_text(history.title_of(one)) for one in range(history.num_sets)]
    figure = make_subplots(
        rows=rows, cols=columns, shared_xaxes="all", shared_yaxes="all", subplot_titles=titles,
        vertical_spacing=0.35 / max(rows, 2), horizontal_spacing=0.03,
    )  # fmt: skip
    tints = tints_of(history, named_branches(np.abs(history.values[-1]).max(0)))
    for one in range(history.num_sets):
        row, column = divmod(one, columns)
        for branch, name in enumerate(history.branches):
            line = _line(graph_objects, places, history.values[:, one, branch], name, tints.get(branch), one == 0)
            figure.add_trace(line, row=row + 1, col=column + 1)
    figure.update_annotations(font_size=11)
    figure.update_xaxes(title=label, row=rows)
    return _titled(figure, "Weights over training, set by set", subtitle(history), 2.1 * rows + 1.6)


def final_figure(history: WeightHistory) -> Any:
    """A plotly figure: the weights of every site at the end."""
    graph_objects, _ = _plotly()
    rows = [f"{layer_name(index)} · {_text(site)}" for index, site in enumerate(history.sites)]
    drawn = graph_objects.Heatmap(
        z=history.final().tolist(), x=[_text(name) for name in history.branches], y=rows, colorscale="Viridis"
    )
    figure = graph_objects.Figure(drawn)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _titled(figure, "Last weights, site by site", subtitle(history, greys=False), 0.22 * len(rows) + 2.2)


def _plotly() -> tuple[Any, Any]:
    try:
        import matplotlib  # noqa: F401  (for the colours)
        from plotly import graph_objects  # type: ignore[import-not-found]
        from plotly.subplots import make_subplots  # type: ignore[import-not-found]
    except ImportError:
        raise MissingExtra(
            "format=html needs plotly, which is not installed: pip install 'mole-experts[plot,plotly]'"
        ) from None
    return graph_objects, make_subplots


def _line(graph_objects: Any, places: np.ndarray, values: np.ndarray, name: str, tint: str | None, listed: bool) -> Any:
    """One branch; its lines in all panels go on and off together. `tint` None: it is one of the many in grey."""
    return graph_objects.Scatter(
        x=places.tolist(),
        y=values.tolist(),
        name=_text(name),
        legendgroup=_text(name),
        showlegend=listed and tint is not None,
        mode="lines+markers" if len(places) == 1 else "lines",
        line={"color": tint or LINE, "width": 2 if tint else 0.7, "dash": "dash" if name == BASE else "solid"},
    )


def _titled(figure: Any, title: str, words: str, height: float) -> Any:
    figure.update_layout(
        title=f"{title}<br><sup>{_text(words)}</sup>", height=round(height * PIXELS), template="plotly_white"
    )
    return figure


def _text(name: str) -> str:
    """A name that plotly shows as it is: it takes a part of HTML for markup."""
    return html.escape(name, quote=False)
