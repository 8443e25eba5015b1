"""The losses of a forward on its routing, joined to the backbone's output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mole.routing import Frame
from mole.routing.losses import labels_of, routing_losses, tokens_of


def add_losses(model: Any, output: Any, frame: Frame, labels: Tensor | None) -> None:
    """Gives `output` its `auxiliary_loss` and `auxiliary_losses`: in training with experts, where there are any."""
    if not model.training or not frame.experts_enabled or not (model.losses or frame.penalties):
        return
    inputs, options = frame.inputs, dict(model.loss_options)
    mask = tokens_of(options.pop("on", "valid"), inputs.attention_mask, inputs.prompt_mask)
    labels = labels_of(inputs.task_names, model.shape.expert_tasks) if labels is None else labels
    seen = frame.seen.values()
    found = routing_losses(model.losses, seen, mask, labels, **options) if model.losses else {}
    total = sum(model.losses[name] * loss for name, loss in found.items())
    for (name, _), penalty in frame.penalties.items():
        found[name] = found.get(name, 0.0) + penalty.to(model.device)
        total = total + penalty.to(model.device)
    output.auxiliary_losses, output.auxiliary_loss = found, total


def as_tuple(output: Any) -> tuple:
    """`output` without names. Raises ValueError where it has losses on the routing, which a tuple has no place for."""
    if hasattr(output, "auxiliary_loss"):
        raise ValueError(
            "return_dict=False: a tuple has no place for auxiliary_loss: leave return_dict out in training"
        )
    return output.to_tuple()
