"""How good a model is: loss, exact match of what it generates, scores of what it says of texts, the table."""

from mole.evaluation.classification import METRICS, scores
from mole.evaluation.exact_match import completions, exact_match
from mole.evaluation.loss import TaskLoss, mean_loss, total
from mole.evaluation.nearest import nearest_experts
from mole.evaluation.predictions import predict, write_predictions
from mole.evaluation.reload import check_reloaded
from mole.evaluation.table import HIGHER_IS_BETTER, Table
from mole.evaluation.validation import Validation

__all__ = [
    "HIGHER_IS_BETTER",
    "METRICS",
    "Table",
    "TaskLoss",
    "Validation",
    "check_reloaded",
    "completions",
    "exact_match",
    "mean_loss",
    "nearest_experts",
    "predict",
    "scores",
    "total",
    "write_predictions",
]
