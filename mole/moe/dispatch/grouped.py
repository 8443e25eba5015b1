"""Grouped back-end: the slots sorted by expert, one grouped product for each linear layer of all experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mole.kernels.grouped_linear import grouped_linear
from mole.kernels.grouped_mm import multiple_of
from mole.kernels.precision import autocast_dtype, without_autocast
from mole.moe.dispatch.plan import ExpertPlan, gated, sorted_keys
from mole.moe.dispatch.recipes import known, weights_of


def grouped(plan: ExpertPlan, x: Tensor, ids: Tensor, weights: Tensor, limit: int | None = None) -> Tensor:
    """Σ over the slots; shapes as of every back-end. Differentiable once; in a trace all slots are computed."""
    found = known(plan.experts[0])
    assert found is not None
    experts = plan.num_experts
    keys, order = sorted_keys(ids, experts)
    ends = torch.searchsorted(keys, torch.arange(experts, device=ids.device), right=True)
    gates = weights.reshape(-1)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        order = order[: int(ends[-1])]
    else:  # slots of nobody are the last expert's, with gate 0: their number is known on the device only
        gates = torch.where((ids >= 0) & (ids < experts), weights, 0.0).reshape(-1)
        ends = torch.where(torch.arange(experts, device=ids.device) == experts - 1, len(order), ends)
    tokens = order // ids.shape[1]
    gates = gates.index_select(0, order)
    dtype = autocast_dtype(x) or x.dtype
    with without_autocast(x):
        rows = x.to(dtype).index_select(0, tokens)
        out = found.recipe(_Groups(plan.experts, ends.to(torch.int32), dtype), rows)
        return out.new_zeros(x.shape[0], out.shape[1]).index_add(0, tokens, gated(out, gates))


class _Groups:
    """The layers of all experts over sorted rows."""

    def __init__(self, experts: Sequence[nn.Module], ends: Tensor, dtype: torch.dtype):
        self.experts, self.first, self.ends, self.dtype = experts, experts[0], ends, dtype

    def linear(self, path: str, rows: Tensor) -> Tensor:
        mats, biases = weights_of(self.experts, path)
        # [n, d_out, d_in], as a linear layer keeps it: read across, nothing is transposed in memory.
        stacked = torch.stack([mat.t() for mat in mats]).to(self.dtype).transpose(1, 2)
        bias = None if biases is None else torch.stack(biases).to(self.dtype)
        return grouped_linear(rows, stacked, self.ends, bias)


def fits(dtype: torch.dtype) -> bool:
    """Whether a dtype is one of grouped products."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and multiple_of(dtype) > 1
