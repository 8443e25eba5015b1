"""Stacked kernel: all experts of a layer in two matrix products, weights applied between them, with its own backward.

    h = x Aᵀ  [N, R];    u = h ⊙ q[column → expert],  q = w s  [N, n];    y = base + u Bᵀ

As the maps are linear this equals gating the input of every expert. Of all this, only the weights (which the router's
graph holds anyway) and the smaller of h and x stay for the backward; q and u are made again there:

    dh = dy B;    dw = s Σ_{columns of e} dh ⊙ h;    dx = (dh ⊙ q) A;    dA = (dh ⊙ q)ᵀ x;    dB = dyᵀ u

Nothing of size [tokens, experts, d] is made, and no sum depends on the order of threads. Legend: N = B·T tokens, n
experts, R the sum of their ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from mole.kernels.once import once
from mole.kernels.precision import autocast_dtype, without_autocast
from mole.kernels.stack import LoraStack, over_all

FEW = 16  # tokens


def stacked(
    x: Tensor, stack: LoraStack, weights: Tensor, base_out: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    """base_out + Σ_e w_e s_e B_e A_e x in two products; shapes as for every kernel.

    Differentiable once: RuntimeError in a second derivative, for which there is the loop.
    """
    if ids is not None:
        weights = over_all(weights, ids, stack.num_experts)
    dtype = autocast_dtype(x)
    if dtype is None:
        return _sum(x, stack, weights, base_out)
    with without_autocast(x):
        return _sum(x.to(dtype), stack, weights, base_out)


def _sum(x: Tensor, stack: LoraStack, weights: Tensor, base_out: Tensor | None) -> Tensor:
    A, B = stack.A, stack.B
    if A.dtype != x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    start = base_out if base_out is not None and base_out.dtype == x.dtype else None
    columns = None if stack.equal_ranks else stack.column_experts()
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad or A.requires_grad or B.requires_grad):
        out = _Stacked.apply(start, x, A, B, weights, stack.scales, columns)
        assert isinstance(out, Tensor)
    elif _is_short(x):
        spread = stack.spread_scales()
        out = _few(start, x, A, B, F.linear(weights.to(spread.dtype), spread))
    else:
        out = _forward(start, x, A, B, weights * stack.scales, columns)[0]
    if base_out is None or start is not None:
        return out
    return (base_out + out.reshape(base_out.shape)).to(base_out.dtype)


def _forward(
    start: Tensor | None, x: Tensor, A: Tensor, B: Tensor, q: Tensor, columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output, and h [B, T, R]."""
    h = F.linear(x, A)
    u = _gated(h, q, columns)
    if start is None:
        return F.linear(u, B), h
    out = torch.addmm(start.flatten(0, -2), u.flatten(0, -2), B.t())
    return out.view(start.shape), h


def _is_short(x: Tensor) -> bool:
    """Whether calls take longer than their numbers. One compiled graph serves all lengths."""
    return not torch.compiler.is_compiling() and x.numel() <= FEW * x.shape[-1] and x.device.type == "cpu"


def _few(start: Tensor | None, x: Tensor, A: Tensor, B: Tensor, q: Tensor) -> Tensor:
    """The output for few tokens in as few calls as possible; `q` [1|B, 1|T, R]."""
    h = F.linear(x, A)
    out = F.linear(h.mul_(q) if h.dtype == q.dtype else (h * q).to(h.dtype), B)
    if start is None:
        return out
    return out.add_(start) if out.shape == start.shape else out.view(start.shape).add_(start)


def _gated(h: Tensor, q: Tensor, columns: Tensor | None) -> Tensor:
    """h [B, T, R] ⊙ q [1|B, 1|T, n], each column with its expert's, in h's dtype: one rounding."""
    if columns is None:
        grouped = h.view(*h.shape[:-1], q.shape[-1], h.shape[-1] // q.shape[-1]) * q[..., None]
        return grouped.view(h.shape).to(h.dtype)
    return (h * q.index_select(-1, columns)).to(h.dtype)


def _sum_of_experts(product: Tensor, experts: int, columns: Tensor | None) -> Tensor:
    """[B, T, R] → [B, T, n]: the columns of each expert added up."""
    if columns is None:
        return product.view(*product.shape[:-1], experts, product.shape[-1] // experts).sum(-1)
    # A product with a 0/1 matrix: index_add_ adds in an order of its own on a GPU.
    return product @ (columns[:, None] == torch.arange(experts, device=columns.device)).to(product.dtype)


class _Stacked(Function):
    """`stacked` with gradients: for x, the weights, and the factors if they train."""

    @staticmethod
    def forward(
        ctx: Any,
        start: Tensor | None,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        weights: Tensor,
        scales: Tensor,
        columns: Tensor | None,
    ) -> Tensor:
        out, h = _forward(start, x, A, B, weights * scales, columns)
        for_A, for_B, for_weights = ctx.needs_input_grad[2:5]
        ctx.keep_x = for_A or for_B or 2 * A.shape[0] > A.shape[1]
        kept = (x if ctx.keep_x else h) if for_A or for_B or for_weights else None
        ctx.save_for_backward(kept, A, B, weights, scales, columns)
        ctx.shape = x.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*once(_backward(ctx, grads[0])), None, None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of start, x, A, B and weights."""
    kept, A, B, weights, scales, columns = ctx.saved_tensors
    for_start, for_x, for_A, for_B, for_weights = ctx.needs_input_grad[:5]
    with torch.no_grad(), without_autocast(grad):
        d = grad.reshape(*ctx.shape[:-1], B.shape[0])
        q = weights * scales
        dh = d @ B
        d_x = d_A = d_B = d_weights = None
        h = kept @ A.t() if ctx.keep_x and (for_weights or for_B) else kept
        if for_weights:
            product = dh.to(torch.promote_types(q.dtype, h.dtype)) * h
            d_weights = (_sum_of_experts(product, q.shape[-1], columns) * scales).sum_to_size(weights.shape)
        if for_x or for_A:
            dh = _gated(dh, q, columns)
            d_x = dh @ A if for_x else None
            d_A = dh.flatten(0, -2).t() @ kept.flatten(0, -2) if for_A else None
        if for_B:
            # In the layout of the stack's B, in which autograd keeps it as it is.
            d_B = (_gated(h, q, columns).flatten(0, -2).t() @ d.flatten(0, -2)).t()
    return (grad if for_start else None), d_x, d_A, d_B, d_weights


def inner(x: Tensor, stack: LoraStack, direction: Tensor) -> Tensor:
    """⟨s_e B_e A_e x, direction⟩ of every expert, as (A_e x) · (s_e B_eᵀ direction): no output of an expert is made.

    `x` [B, T, d_in], `direction` [B, T, d_out] → [B, T, n], in the dtype of the scales. Differentiable.
    """
    dtype = autocast_dtype(x) or x.dtype
    with without_autocast(x):
        low = F.linear(x.to(dtype), stack.A.to(dtype))
        pull = F.linear(direction.to(dtype), stack.B.to(dtype).t())
        product = low.to(stack.scales.dtype) * pull
        columns = None if stack.equal_ranks else stack.column_experts()
        return _sum_of_experts(product, stack.num_experts, columns) * stack.scales
