"""The loss of one micro-batch as sums, so that a step can be weighted by tokens however it is cut up.

Where labels are [B], a head says something of each whole text; then what counts as a supervised token is a text.
Shapes: B sequences, T tokens, V words; S supervised tokens among them; C labels.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100


def supervised_tokens(labels: Tensor) -> int:
    """How many positions of labels [B, T] the loss counts: all but -100 and the first of each row.

    Of labels [B] of whole texts: all but -100; all numbers of a regression.
    """
    if labels.dim() == 1:
        return labels.numel() if labels.is_floating_point() else int((labels != IGNORED).sum())
    return int((labels[:, 1:] != IGNORED).sum())


def valid_tokens(batch: dict[str, Any]) -> int:
    """How many positions of a batch hold a real token.

    Those of `attention_mask`, those of a sample in packed rows, or all of `labels` where there is neither.
    """
    if "segment_ids" in batch:
        return int((batch["segment_ids"] >= 0).sum())
    mask = batch.get("attention_mask")
    return batch["labels"].numel() if mask is None else int((mask != 0).sum())


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of labels [B, T] under the logits [B, T, V] of the positions before them.

    In float32 at least. Only supervised positions [S, V] are brought to it, not all logits.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORED
    chosen = at_least_float32(logits[:, :-1][counted])
    return functional.cross_entropy(chosen, targets[counted], reduction="sum")


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over whole texts of the cross-entropy of int64 labels [B] (-100: not counted) under logits [B, C].

    Or of the squared error of numbers [B] against logits [B, 1]. In float32 at least. Raises ValueError for logits of
    another shape, which are those of a model without a head for whole texts.
    """
    is_regression = labels.is_floating_point()
    if logits.shape[:-1] != labels.shape or (is_regression and logits.shape[-1] != 1):
        wanted = f"[{len(labels)}, {1 if is_regression else 'labels'}]"
        raise ValueError(
            f"the model gives logits {list(logits.shape)}, and the data has one label for each text, so {wanted} is "
            "wanted: give the backbone the head of the data"
        )
    logits = at_least_float32(logits)
    if is_regression:
        return (logits.squeeze(-1) - labels.to(logits.dtype)).square().sum()
    return functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class Objective:
    """A model and its loss."""

    def __init__(self, model: nn.Module):
        self.model = model
        named = inspect.signature(model.forward).parameters
        self.takes = frozenset(named)
        self._without_cache = {"use_cache": False} if "use_cache" in named else {}

    def output(self, batch: dict[str, Any]) -> Any:
        """What the model gives for a batch; a model that names `input_ids` gets only what it names."""
        inputs = {
            key: value
            for key, value in batch.items()
            if key != "labels" and (key in self.takes or "input_ids" not in self.takes)
        }
        return self.model(**inputs, **self._without_cache)

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """`batch`: labels [B, T] or [B], and the model's inputs.

        Returns the sum of the losses of tokens or texts; the model's `auxiliary_loss` (a mean over tokens) if it gives
        one; and its `auxiliary_losses`, the parts of that by name, to be logged.
        """
        output = self.output(batch)
        labels, parts = batch["labels"], getattr(output, "auxiliary_losses", None)
        loss = (text_loss if labels.dim() == 1 else token_loss)(output.logits, labels)
        return loss, getattr(output, "auxiliary_loss", None), dict(parts or {})
