"""A training step that is only rehearsed: does the loss reach what is trained, and how much memory will a step take?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mole.training.batches import to_device
from mole.training.learner import gradient_checkpointing
from mole.training.loss import Objective, supervised_tokens
from mole.training.settings import TrainingConfig
from mole.training.step import TrainingFailed

MOMENTS = 2  # that AdamW keeps of each trained weight


@dataclass(frozen=True)
class Rehearsal:
    """What a step was found to be. Sizes are in bytes, `activations` those of a whole micro-batch, logits included."""

    parameters: int
    trained: int
    loss: float
    weights: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes that a step takes, but for what the libraries keep for themselves."""
        return self.weights + self.optimizer + self.activations


def rehearse(
    model: nn.Module, batch: dict[str, Any], training: TrainingConfig, accelerator: Accelerator, rows: int
) -> Rehearsal:
    """One forward and backward on `batch`, best of one row with the longest sample; weights and gradients stay.

    `rows` is how many rows a micro-batch will have: what one row keeps for backward is multiplied by it. Raises
    TrainingFailed for a loss that is not finite, or that no trainable parameter has a part in.
    """
    model.to(accelerator.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    model.train()
    try:
        with gradient_checkpointing(model, training.gradient_checkpointing), accelerator.autocast():
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss, auxiliary, _ = Objective(model)(to_device(batch, accelerator.device))
            mean = loss / max(supervised_tokens(batch["labels"]), 1)
            gradients = torch.autograd.grad(mean if auxiliary is None else mean + auxiliary, trained, allow_unused=True)
    finally:
        model.train(was_training)
    value = float(mean.detach())
    if not math.isfinite(value):
        raise TrainingFailed(f"the loss is {value}: check the data, or use training.precision=fp32")
    if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
        raise TrainingFailed("no trainable parameter gets a gradient: check what is trainable")
    return Rehearsal(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in trained),
        loss=value,
        weights=_bytes(model.parameters()),
        optimizer=(1 + MOMENTS) * _bytes(trained),
        activations=rows * sum(kept.values()) // len(batch["labels"]),
    )


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
