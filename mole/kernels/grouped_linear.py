"""One linear map per group of sorted rows, with gradients; on the grouped products that torch has where it has them.

y_p = x_p M_e + b_e for the rows p of group e;   dx_p = dy_p M_eᵀ;   dM_e = Σ_p x_pᵀ dy_p;   db_e = Σ_p dy_p
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mole.kernels.grouped_mm import grouped_mm, grouped_outer
from mole.kernels.once import once


def grouped_linear(rows: Tensor, mats: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows` [P, k], sorted by group, `mats` [n, k, m], `ends` int32 [n] the last at P, `bias` [n, m] → [P, m].

    All of one dtype. Groups may be empty: their gradients are 0. Differentiable once.
    """
    if torch.is_grad_enabled() and (rows.requires_grad or mats.requires_grad):
        out = _GroupedLinear.apply(rows, mats, ends)
        assert isinstance(out, Tensor)
    else:
        out = grouped_mm(rows, mats, ends)
    if bias is None:
        return out
    groups = torch.searchsorted(ends, torch.arange(len(rows), device=rows.device, dtype=ends.dtype), right=True)
    return out + bias.index_select(0, groups)


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, mats: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, mats, ends)
        return grouped_mm(rows, mats, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, mats, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        with torch.no_grad():
            d_rows = grouped_mm(grad, mats.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
            d_mats = grouped_outer(rows, grad, ends) if ctx.needs_input_grad[1] else None
        return (*once((d_rows, d_mats)), None)
