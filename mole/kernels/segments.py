"""Segments kernel: one expert per example, so each expert present gets its examples as one batch of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from mole.kernels.grouped import grouped
from mole.kernels.stack import LoraStack
from mole.kernels.stacked import stacked


def segments(
    x: Tensor, stack: LoraStack, weights: Tensor, base_out: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    """base_out + w_e s_e B_e A_e x with the expert e of each example; shapes as for every kernel, `ids` [1|B, 1, 1].

    Raises ValueError for several experts per example, or another one for each token. Off the CPU examples are sorted
    on the device, by the grouped kernel. Differentiable once.
    """
    if ids is None or max(ids.shape[1], weights.shape[1], weights.shape[2]) > 1:
        given = tuple(weights.shape) if ids is None else tuple(torch.broadcast_shapes(weights.shape, ids.shape))
        raise ValueError(
            f"kernel=segments serves routings of one expert per example, [B, 1, 1] with ids; got {given}: use "
            "kernel=auto"
        )
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return grouped(x, stack, weights, base_out, ids)
    wanted = ids.expand(x.shape[0], 1, 1).flatten().tolist()
    rows: dict[int, list[int]] = {}
    for row, expert in enumerate(wanted):
        rows.setdefault(expert if 0 <= expert < stack.num_experts else -1, []).append(row)
    if len(rows) == 1 and -1 not in rows:
        return stacked(x, stack.part([wanted[0]]), weights, base_out)
    return _by_expert(x, stack, weights, base_out, rows)


def _by_expert(
    x: Tensor, stack: LoraStack, weights: Tensor, base_out: Tensor | None, rows: dict[int, list[int]]
) -> Tensor:
    gates = weights.expand(x.shape[0], 1, 1)
    if base_out is None:
        base_out = x.new_zeros(*x.shape[:-1], stack.B.shape[0])
    base = base_out.view(*x.shape[:-1], -1)
    order = [row for some in rows.values() for row in some]
    # Split once: the gradient of the stack is then put together in one piece, 0 where nobody asked.
    factors_A, factors_B = stack.A.split(stack.ranks), stack.B.split(stack.ranks, dim=1)
    parts = []
    for expert, some in rows.items():
        place = torch.tensor(some)
        here = base.index_select(0, place)
        if expert >= 0:
            alone = LoraStack(factors_A[expert], factors_B[expert], stack.scales[expert, None], (stack.ranks[expert],))
            here = stacked(x.index_select(0, place), alone, gates.index_select(0, place), here)
        parts.append(here)
    back = torch.tensor(order).argsort()
    return torch.cat(parts).index_select(0, back).reshape(base_out.shape)
