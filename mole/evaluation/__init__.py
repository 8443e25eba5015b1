"""How good a model is: loss on supervised tokens, exact match of what it generates, and the table that compares."""

from mole.evaluation.exact_match import completions, exact_match
from mole.evaluation.loss import TaskLoss, mean_loss, total
from mole.evaluation.nearest import nearest_experts
from mole.evaluation.reload import check_reloaded
from mole.evaluation.table import HIGHER_IS_BETTER, Table
from mole.evaluation.validation import Validation

__all__ = [
    "HIGHER_IS_BETTER",
    "Table",
    "TaskLoss",
    "Validation",
    "check_reloaded",
    "completions",
    "exact_match",
    "mean_loss",
    "nearest_experts",
    "total",
]
