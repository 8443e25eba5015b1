"""The loss of one micro-batch as sums, so that a step can be weighted by tokens however it is cut up.

Shapes: B sequences, T tokens, V words; S supervised tokens among them.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100


def supervised_tokens(labels: Tensor) -> int:
    """How many positions of labels [B, T] the loss counts: all but -100 and the first of each row."""
    return int((labels[:, 1:] != IGNORED).sum())


def valid_tokens(batch: dict[str, Any]) -> int:
    """How many positions of a batch hold a real token: those of `attention_mask`, all of `labels` without one."""
    mask = batch.get("attention_mask")
    return batch["labels"].numel() if mask is None else int((mask != 0).sum())


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of labels [B, T] under the logits [B, T, V] of the positions before them.

    In float32 at least. Only supervised positions [S, V] are brought to it, not all logits.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORED
    chosen = logits[:, :-1][counted]
    if chosen.dtype in (torch.float16, torch.bfloat16):
        chosen = chosen.float()
    return functional.cross_entropy(chosen, targets[counted], reduction="sum")


class Objective:
    """A model and its loss."""

    def __init__(self, model: nn.Module):
        self.model = model
        named = inspect.signature(model.forward).parameters
        self._takes = set(named) if "input_ids" in named else None
        self._without_cache = {"use_cache": False} if "use_cache" in named else {}

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """`batch`: labels [B, T] and the model's inputs; a model that names `input_ids` gets only what it names.

        Returns the sum of the token losses; the model's `auxiliary_loss` (a mean over tokens) if it gives one; and its
        `auxiliary_losses`, the parts of that by name, to be logged.
        """
        inputs = {
            key: value
            for key, value in batch.items()
            if key != "labels" and (self._takes is None or key in self._takes)
        }
        output = self.model(**inputs, **self._without_cache)
        loss, parts = token_loss(output.logits, batch["labels"]), getattr(output, "auxiliary_losses", None)
        return loss, getattr(output, "auxiliary_loss", None), dict(parts or {})
