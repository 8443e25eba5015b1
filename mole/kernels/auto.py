"""Which kernel computes a routing: decided by what is known before any number is read, so that nothing waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from mole.kernels.grouped_mm import has_grouped_mm
from mole.kernels.stack import LoraStack

# Work of the stacked kernel over that of the grouped one, R / (K r), up to which its two large products win.
STACKED_RATIO = 6.0
FEW_PAIRS = 8  # of token and expert, which are computed one by one sooner than sorted


def pick(x: Tensor, stack: LoraStack, weights: Tensor, ids: Tensor | None) -> str:
    """The name of the fastest kernel for weights [1|B, 1|T, K] of the experts `ids`, None: of all.

    Goes by shapes, dtype and device; what is compiled keeps one kernel for all lengths.
    """
    if torch.compiler.is_compiling():
        return "stacked"
    on_cpu = x.device.type == "cpu"
    static = weights.shape[0] == 1 and weights.shape[1] == 1 and on_cpu
    if ids is None:
        # One token's weights look static too; a product with its few columns is not worth a look at them.
        return "folded" if static and x.numel() > x.shape[-1] and not weights.requires_grad else "stacked"
    count = ids.shape[-1]
    if is_dense(stack, count):
        return "stacked"
    if weights.shape[1] == 1 and ids.shape[1] == 1:
        if count == 1:
            return "segments" if on_cpu or has_grouped_mm(x.device.type, x.dtype) else "stacked"
        if static and ids.shape[0] == 1 and not weights.requires_grad:
            return "folded"
    if on_cpu and x.numel() * count <= FEW_PAIRS * x.shape[-1]:
        return "loop"
    if has_grouped_mm(x.device.type, x.dtype):
        return "grouped"
    return "loop" if on_cpu else "stacked"


def is_dense(stack: LoraStack, count: int) -> bool:
    """Whether `count` experts per token are so many of all that all of them at once cost less than a choice."""
    return sum(stack.ranks) <= STACKED_RATIO * count * max(stack.ranks)
