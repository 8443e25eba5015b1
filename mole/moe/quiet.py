"""A look at modules that leaves no trace: eval, no grad, the state of random numbers and each part's mode restored."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def quietly(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """For the body, `modules` are in eval, without grad; `device` is where they draw random numbers."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    python = random.getstate()
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            for part, _ in modes:
                part.training = False
            yield
        finally:
            random.setstate(python)
            for part, mode in modes:
                part.training = mode
