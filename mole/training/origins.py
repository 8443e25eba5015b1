"""What a run rests on and does not save: its frozen weights and its data, known again by their fingerprints."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

VALUES = 256  # of each frozen tensor, evenly spread: tells models apart without reading gigabytes
SAMPLES = 64  # of the data, evenly spread


def fingerprints(model: nn.Module, train: Sequence[Any]) -> dict[str, str]:
    """sha256 by what it is of: name, shape, dtype and some values of each frozen parameter; some samples."""
    weights, data = hashlib.sha256(), hashlib.sha256(str(len(train)).encode())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        if flat.numel():
            values = flat[:: max(1, flat.numel() // VALUES)].contiguous()
            weights.update(values.view(torch.uint8).cpu().numpy().tobytes())
    for index in range(min(SAMPLES, len(train))):
        data.update(repr(train[index * len(train) // min(SAMPLES, len(train))]).encode())
    return {"frozen weights": weights.hexdigest(), "training data": data.hexdigest()}


def require_same(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises ValueError, naming it, if something that the run began with is another one now."""
    for what, digest in saved.items():
        if now.get(what) != digest:
            raise ValueError(
                f"the {what} of this run are not those that it began with: give it what it had, or start a new run"
            )
