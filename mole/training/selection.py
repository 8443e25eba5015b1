"""Which evaluation was the best so far, and whether it is time to stop early."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mole.registry import unknown
from mole.training.settings import TrainingConfig


@dataclass
class Selection:
    """The best score so far and how many evaluations have passed without a gain. Plain data: a checkpoint has it.

    The evaluation before step 1 is the start, not a candidate.
    """

    best_step: int | None = None
    best_score: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    to_beat: float | None = None
    without_gain: int = 0

    def see(self, step: int, metrics: dict[str, float], config: TrainingConfig) -> bool:
        """Takes note of an evaluation; True if it is the best so far.

        Raises ValueError if the metric to select by is not among its metrics.
        """
        if config.best_metric is None:
            return False
        metric, direction = criterion(config, metrics)
        if metric not in metrics:
            raise ValueError(f"training.best_metric: {unknown('metric', metric, metrics)}")
        if step == 0:
            return False
        score = float(metrics[metric])
        sign = 1.0 if direction == "min" else -1.0
        if not math.isnan(score) and (
            self.to_beat is None or sign * (self.to_beat - score) > config.early_stopping_gain
        ):
            self.to_beat, self.without_gain = score, 0
        else:
            self.without_gain += 1
        if math.isnan(score) or (self.best_score is not None and sign * (self.best_score - score) <= 0):
            return False
        self.best_step, self.best_score, self.best_metrics = step, score, dict(metrics)
        return True

    def exhausted(self, config: TrainingConfig) -> bool:
        """Whether patience has run out."""
        return config.early_stopping_patience is not None and self.without_gain >= config.early_stopping_patience

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


def criterion(config: TrainingConfig, metrics: Mapping[str, float]) -> tuple[str, str]:
    """The metric to select by, and whether its "min" or "max" is best; `metrics` is what an evaluation gave.

    By itself (auto) that is validation_score where there is one, else validation_loss; losses are best at their
    least, everything else at its most.
    """
    metric = config.best_metric
    assert metric is not None
    if metric == "auto":
        metric = "validation_score" if "validation_score" in metrics else "validation_loss"
    if config.best_direction != "auto":
        return metric, config.best_direction
    return metric, "min" if "loss" in metric else "max"
