"""What training looks at on the way: the loss on validation samples, over all tasks and by task, and scores."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mole.data import Sample, default_metric
from mole.evaluation.classification import scores
from mole.evaluation.loss import by_task, mean_loss, text_losses, total
from mole.evaluation.predictions import predict
from mole.head import Head


class Validation:
    """`evaluate` of a training run: step → {"validation_loss": nats per token, "validation_loss/<task>": …}.

    The tasks' own losses are given where there are several. Each process evaluates all samples, so that all agree.

    Samples with targets want the `head` that their targets are of; `metric` names their main score (None: the head's
    usual one). Then the loss is per text, and there are validation_<part> for each part of the score and
    validation_score; where there are several tasks, validation_score/<task> too. `limit`: only so many of the samples,
    the first.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        collate: Callable[[list[Sample]], dict[str, Any]],
        batch_size: int,
        *,
        head: Head | None = None,
        metric: str | None = None,
        limit: int | None = None,
    ):
        self.model, self.samples, self.collate, self.batch_size = model, samples[:limit], collate, batch_size
        if (head is None) != all(sample.target is None for sample in self.samples):
            raise ValueError("samples with targets are scored by their head: give both or neither")
        self.head, self.metric = head, metric

    def __call__(self, step: int) -> dict[str, float]:
        if self.head is not None:
            logits = predict(self.model, self.samples, self.collate, batch_size=self.batch_size)
            return self.scored(logits, self.head)
        losses = mean_loss(self.model, self.samples, self.collate, batch_size=self.batch_size)
        metrics = {"validation_loss": total(losses.values()).loss}
        if len(losses) > 1:
            metrics |= {f"validation_loss/{task}": loss.loss for task, loss in losses.items()}
        return metrics

    def scored(self, logits: Tensor, head: Head) -> dict[str, float]:
        """The metrics that logits [N, C] of all samples give."""
        losses = by_task(self.samples, text_losses(logits, self.samples), [1] * len(self.samples))
        metric = self.metric or default_metric(head)

        def found(rows: list[int]) -> dict[str, float]:
            return scores(metric, head, logits[rows], torch.tensor([self.samples[row].target for row in rows]))

        parts = found(list(range(len(self.samples))))
        metrics = {"validation_loss": total(losses.values()).loss}
        metrics |= {f"validation_{part}": value for part, value in parts.items()}
        for task, loss in losses.items() if len(losses) > 1 else ():
            rows = [row for row, sample in enumerate(self.samples) if sample.task == task]
            metrics |= {f"validation_loss/{task}": loss.loss, f"validation_score/{task}": found(rows)["score"]}
        return metrics
