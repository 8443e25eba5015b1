"""Evaluation leaves a model as it was."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients in the body; afterwards every module has the training flag that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; what is no tensor (task names) stays."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def named(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """What `model` names of the batch, as in training; all of it for a model that does not name `input_ids`."""
    known = inspect.signature(model.forward).parameters
    return {key: value for key, value in batch.items() if "input_ids" not in known or key in known}
