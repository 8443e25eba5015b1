"""Which expert works in which layer: a heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mole.analysis.heat_map import Words, heat_map
from mole.analysis.record import CannotPlot, RunRecord
from mole.analysis.shares import mean_by_layer, telling
from mole.figure import without_common_start

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_layers(record: RunRecord) -> Figure:
    """Mean weight of each expert in each layer, over all tokens. One row where all layers share their routing."""
    run = record.routing
    entries, which = telling(run)
    mean = mean_by_layer(entries)
    if not mean.tokens:
        raise CannotPlot("the routing log holds padding only")
    start, names = without_common_start(run.layer_names)
    values = mean.values
    if len(names) > 1 and np.abs(values - values[0]).max() < 1e-7:
        values, names, start = values[:1], [f"all {len(names)} layers"], ""
    words = Words(
        "Expert share per layer",
        f"{record.name} · {mean.tokens:,} tokens, {which}",
        "expert",
        "" if len(names) == 1 else f"layer, under {start}" if start else "layer",
    )
    return heat_map(values, names, run.expert_names, words, mean.is_share)
