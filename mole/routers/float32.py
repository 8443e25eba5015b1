"""Linear maps of routers: computed in float32 or better, whatever the model computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is if it is finer."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off for the body, on the device of `x`: what a router computes decides, and must not be rounded."""
    return torch.autocast(x.device.type, enabled=False)


class Linear(nn.Linear):
    """A linear map [.., d_in] → [.., d_out] in float32, or in the dtype of its weights if that is finer."""

    def forward(self, input: Tensor) -> Tensor:
        with without_autocast(input):
            weight = at_least_float32(self.weight)
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            return F.linear(input.to(weight.dtype), weight, bias)
