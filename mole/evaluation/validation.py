"""What training looks at on the way: the loss on validation samples, over all tasks and by task."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mole.data import Sample
from mole.evaluation.loss import mean_loss, total


class Validation:
    """`evaluate` of a training run: step → {"validation_loss": nats per token, "validation_loss/<task>": …}.

    The tasks' own losses are given where there are several. Each process evaluates all samples, so that all agree.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        collate: Callable[[list[Sample]], dict[str, Any]],
        batch_size: int,
    ):
        self.model, self.samples, self.collate, self.batch_size = model, samples, collate, batch_size

    def __call__(self, step: int) -> dict[str, float]:
        losses = mean_loss(self.model, self.samples, self.collate, batch_size=self.batch_size)
        metrics = {"validation_loss": total(losses.values()).loss}
        if len(losses) > 1:
            metrics |= {f"validation_loss/{task}": loss.loss for task, loss in losses.items()}
        return metrics
