"""Which model is how good at which task: the table of an evaluation as a heat map."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mole.analysis.heat_map import Words, heat_map
from mole.analysis.record import CannotPlot, RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_scores(record: RunRecord) -> Figure:
    """Scores of the models (rows) on the tasks. Models that lack a task, or whose score is not finite, are left out."""
    metric, rows = record.scores
    tasks = list(dict.fromkeys(task for values in rows.values() for task in values))
    whole = {
        row: values for row, values in rows.items() if all(math.isfinite(values.get(task, math.nan)) for task in tasks)
    }
    if not whole:
        raise CannotPlot(f"{record.folder.evaluation} has no model with a score for every task")
    values = np.array([[scores[task] for task in tasks] for scores in whole.values()])
    words = Words(f"{metric} by model and task", record.name, "task", "model", scale=metric)
    return heat_map(values, list(whole), tasks, words, is_share=False)
