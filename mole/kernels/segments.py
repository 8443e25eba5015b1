"""Segments kernel: one expert per example, so that neighbours with the same expert are a batch of its own."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from mole.kernels.grouped import grouped
from mole.kernels.precision import autocast_dtype
from mole.kernels.stack import LoraStack
from mole.kernels.stacked import stacked

LONG = 64  # tokens per example, from which on a batch of their own is worth its calls


def segments(
    x: Tensor, stack: LoraStack, weights: Tensor, base_out: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    """base_out + w_e s_e B_e A_e x with the expert e of each example; shapes as for every kernel, `ids` [1|B, 1, 1].

    Raises ValueError for several experts per example, or another one for each token. Short examples, and those
    off the CPU, are sorted by the grouped kernel. Differentiable once.
    """
    if ids is None or max(ids.shape[1], weights.shape[1], weights.shape[2]) > 1:
        given = tuple(weights.shape) if ids is None else tuple(torch.broadcast_shapes(weights.shape, ids.shape))
        raise ValueError(
            f"kernel=segments serves routings of one expert per example, [B, 1, 1] with ids; got {given}: use "
            "kernel=auto"
        )
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return grouped(x, stack, weights, base_out, ids)
    wanted = [
        expert if 0 <= expert < stack.num_experts else -1 for expert in ids.expand(len(x), 1, 1).flatten().tolist()
    ]
    runs = [(expert, len(list(some))) for expert, some in groupby(wanted)]
    if not runs or (len(runs) > 1 and x.shape[1] < LONG):
        return grouped(x, stack, weights, base_out, ids)
    if len(runs) == 1 and runs[0][0] >= 0:
        return stacked(x, stack.part([runs[0][0]]), weights, base_out)
    return _run_by_run(x, stack, weights, base_out, runs)


def _run_by_run(
    x: Tensor, stack: LoraStack, weights: Tensor, base_out: Tensor | None, runs: list[tuple[int, int]]
) -> Tensor:
    """`runs` an expert, and of how many neighbours it is."""
    lengths = [length for _, length in runs]
    if base_out is None:
        base_out = x.new_zeros(*x.shape[:-1], stack.B.shape[0], dtype=autocast_dtype(x))
    base = base_out.view(*x.shape[:-1], stack.B.shape[0])
    # Split once: the gradient of the stack is then put together in one piece, 0 where nobody asked.
    factors_A, factors_B = stack.A.split(stack.ranks), stack.B.split(stack.ranks, dim=1)
    parts = []
    rows = zip(x.split(lengths), base.split(lengths), weights.expand(len(x), 1, 1).split(lengths), strict=True)
    for (expert, _), (some, start, gates) in zip(runs, rows, strict=True):
        if expert >= 0:
            scale, ranks = stack.scales[expert, None], (stack.ranks[expert],)
            start = stacked(some, LoraStack(factors_A[expert], factors_B[expert], scale, ranks), gates, start)
        parts.append(start)
    return torch.cat(parts).view(base_out.shape)
