"""Reference kernel: one expert after another, straightforward autograd. The oracle of every faster kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mole.kernels.precision import autocast_dtype, without_autocast
from mole.kernels.stack import LoraStack, over_all


def loop(
    x: Tensor,
    stack: LoraStack,
    weights: Tensor,
    base_out: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    dropout: Sequence[float] | None = None,
) -> Tensor:
    """base_out + Σ_e w_e s_e B_e A_e x, expert by expert; shapes as for every kernel.

    With `ids` each expert sees its own tokens only. `dropout` gives each expert a mask of its own on x, with its own
    rate.
    """
    if ids is not None and torch.compiler.is_compiling():  # how many tokens an expert has would be no constant
        weights, ids = over_all(weights, ids, stack.num_experts), None
    x = x.to(autocast_dtype(x) or x.dtype)
    with without_autocast(x):
        add = _dense if ids is None else _chosen
        out = add(x, stack, weights, ids, dropout)
    return out if base_out is None else (base_out + out.reshape(base_out.shape)).to(base_out.dtype)


def _dense(x: Tensor, stack: LoraStack, weights: Tensor, ids: Tensor | None, dropout: Sequence[float] | None) -> Tensor:
    out = x.new_zeros(*x.shape[:-1], stack.B.shape[0])
    for expert, part in enumerate(stack.slices()):
        out = out + _share(x, stack, expert, part, weights[..., expert, None], dropout)
    return out


def _chosen(
    x: Tensor, stack: LoraStack, weights: Tensor, ids: Tensor | None, dropout: Sequence[float] | None
) -> Tensor:
    """Tokens are gathered for each expert that has some, and what it makes of them is added where they were."""
    assert ids is not None
    lead = x.shape[:-1]
    rows = x.reshape(-1, x.shape[-1])
    gates = weights.expand(*lead, -1).reshape(-1, weights.shape[-1])
    owners = ids.expand(*lead, -1).reshape(gates.shape)
    out = x.new_zeros(rows.shape[0], stack.B.shape[0])
    # Every expert is part of the graph, so that its gradient is 0, not missing, where no token chose it.
    factors_A, factors_B = stack.A.split(stack.ranks), stack.B.split(stack.ranks, dim=1)
    for expert in range(stack.num_experts):
        token, slot = torch.nonzero(owners == expert, as_tuple=True)
        if not len(token):
            continue
        seen = rows.index_select(0, token)
        if dropout is not None:
            seen = F.dropout(seen, dropout[expert])
        low = seen @ factors_A[expert].to(x.dtype).T
        gated = (low * (gates[token, slot, None] * stack.scales[expert])).to(x.dtype)
        out = out.index_add(0, token, gated @ factors_B[expert].to(x.dtype).T)
    return out.view(*lead, stack.B.shape[0])


def _share(
    x: Tensor, stack: LoraStack, expert: int, part: slice, gate: Tensor, dropout: Sequence[float] | None
) -> Tensor:
    seen = F.dropout(x, dropout[expert]) if dropout is not None else x
    low = seen @ stack.A[part].to(x.dtype).T
    gated = (low * (gate * stack.scales[expert])).to(x.dtype)
    return gated @ stack.B[:, part].to(x.dtype).T
