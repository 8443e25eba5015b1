"""Which expert works on which task: a heat map with numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mole.analysis.heat_map import Words, heat_map
from mole.analysis.record import CannotPlot, RunRecord
from mole.analysis.shares import mean_by_task, telling

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_tasks(record: RunRecord) -> Figure:
    """Mean weight of each expert on each task, over its tokens and all layers.

    Tasks that are called like experts come first, in the experts' order: a good router shows as a diagonal.
    """
    run = record.routing
    entries, which = telling(run)
    means = mean_by_task(entries)
    if not means:
        raise CannotPlot("the routing log has no task names, so there is no share per task")
    tasks = [name for name in run.expert_names if name in means]
    tasks += [name for name in means if name not in tasks]
    tokens = sum(mean.tokens for mean in means.values())
    words = Words("Expert share per task", f"{record.name} · {tokens:,} tokens, {which}", "expert", "task")
    values = np.stack([means[task].values for task in tasks])
    return heat_map(values, tasks, run.expert_names, words, all(mean.is_share for mean in means.values()))
