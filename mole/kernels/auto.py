"""Which kernel computes a routing: decided by what is known before any number is read, so that nothing waits for it.

The stacked kernel's time grows with R, the columns of all experts; the grouped one's with K, most of it for moving the
rows of the pairs, whatever the rank. The constants are where the two cross, measured on a CPU with one thread, forward
and backward, in float32: scripts/benchmarks/mixture.py measures whether they still hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mole.kernels.stack import LoraStack

MOVING = 40.0  # columns of the stack whose products take as long as moving a pair's rows
MULTIPLYING = 1.5  # the same for each rank of a pair
STARTING = 9000  # (tokens + READING) · R, below which sorting costs more than it saves
READING = 4  # tokens whose products with a column take as long as reading the column


def pick(x: Tensor, stack: LoraStack, weights: Tensor, ids: Tensor | None) -> str:
    """The name of the fastest kernel for weights [1|B, 1|T, K] of the experts `ids`, None: of all.

    Goes by shapes and the device; what is compiled keeps one kernel for all lengths.
    """
    if torch.compiler.is_compiling():
        return "stacked"
    on_cpu = x.device.type == "cpu"
    static = weights.shape[0] == 1 and weights.shape[1] == 1 and on_cpu and not weights.requires_grad
    tokens = x.numel() // x.shape[-1]
    if ids is None:
        # One token's weights look static too; its few products are not worth a look at them.
        return "folded" if static and tokens > 1 else "stacked"
    by_example, count = weights.shape[1] == 1 and ids.shape[1] == 1, ids.shape[-1]
    if by_example and count == 1 and on_cpu and len(x) == 1:
        return "segments"
    if is_dense(stack, count):
        return "stacked"
    if by_example and static and ids.shape[0] == 1:
        return "folded"
    if (tokens + READING) * sum(stack.ranks) < STARTING:
        return "stacked"
    return "segments" if by_example and count == 1 else "grouped"


def is_dense(stack: LoraStack, count: int) -> bool:
    """Whether `count` experts per token are so many of all that all of them at once cost less than a choice."""
    return sum(stack.ranks) <= count * (MOVING + MULTIPLYING * max(stack.ranks))
