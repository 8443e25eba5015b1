"""Grouped kernel: the chosen pairs of token and expert, sorted by expert; two grouped products with a backward.

    u_p = q_p A_e x_t,   q = w s;     y_t = base_t + Σ_{pairs p of t} B_e u_p

Work grows with the K experts that a token has, not with the E that there are. Of the activations, the backward keeps
A x of the pairs [P, r], and x where experts train; rows are gathered again there:

    g_p = B_eᵀ dy_t;    dq_p = ⟨g_p, A_e x_t⟩;    dx_t = Σ_p A_eᵀ q_p g_p;    dA_e = Σ_p q_p g_p x_tᵀ;
    dB_e = Σ_p dy_t u_pᵀ

Legend: N = B·T tokens, P = N·K pairs, n experts, r the largest rank (others are filled up with zeros).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from mole.kernels.grouped_mm import grouped_mm, grouped_outer, multiple_of
from mole.kernels.once import once
from mole.kernels.precision import autocast_dtype, without_autocast
from mole.kernels.stack import LoraStack

IN_CACHE = 2**20  # numbers


def grouped(
    x: Tensor, stack: LoraStack, weights: Tensor, base_out: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    """base_out + Σ over the chosen experts of w_e s_e B_e A_e x; shapes as for every kernel.

    Differentiable once: RuntimeError in a second derivative, for which there is the loop.
    """
    if ids is None:
        ids = torch.arange(stack.num_experts, device=x.device).expand(1, 1, -1)
    dtype = autocast_dtype(x) or x.dtype
    with without_autocast(x):
        out = _sum(x.to(dtype), stack, weights, ids)
    return out if base_out is None else (base_out + out.reshape(base_out.shape)).to(base_out.dtype)


class Pairs(NamedTuple):
    """Pairs of token and expert, sorted by expert: `tokens` int64 [P], `gates` q [P], `ends` int32 [n]."""

    tokens: Tensor
    gates: Tensor
    ends: Tensor


def sorted_pairs(weights: Tensor, ids: Tensor, scales: Tensor, batch: int, length: int) -> Pairs:
    """The pairs of a routing, `weights` and `ids` [1|B, 1|T, K].

    A routing of whole examples is sorted as such, with a pair for each of their tokens. Slots of nobody come last: left
    out where that waits for no device, else with gate 0 as pairs of the last expert.
    """
    n, by_example = len(scales), weights.shape[1] == 1 and ids.shape[1] == 1
    lead, repeats = ((batch, 1), length) if by_example else ((batch, length), 1)
    ids, weights = ids.expand(*lead, weights.shape[-1]), weights.expand(*lead, -1)
    known = (ids >= 0) & (ids < n)
    experts, order = torch.where(known, ids, n).flatten().sort(stable=True)
    gates = torch.where(known, weights, 0.0).flatten().index_select(0, order)
    gates = gates * scales.index_select(0, experts.clamp_max(n - 1))
    places = torch.arange(n, device=ids.device)
    ends = torch.searchsorted(experts, places, right=True)
    if ends.device.type == "cpu" and not torch.compiler.is_compiling():
        count = int(ends[-1])
        order, gates = order[:count], gates[:count]
    else:
        ends = torch.where(places == n - 1, len(experts), ends)
    tokens = order // weights.shape[-1]
    if by_example:
        tokens = (tokens[:, None] * repeats + torch.arange(repeats, device=ids.device)).flatten()
        gates = gates[:, None].expand(-1, repeats).flatten()
        ends = ends * repeats
    return Pairs(tokens, gates, ends.to(torch.int32))


def _sum(x: Tensor, stack: LoraStack, weights: Tensor, ids: Tensor) -> Tensor:
    """[B, T, d_in] → [B, T, d_out]."""
    A, B = stack.blocks(multiple_of(x.dtype))
    A, B = A.to(x.dtype), B.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    pairs = sorted_pairs(weights, ids, stack.scales, *x.shape[:2])
    if torch.is_grad_enabled() and any(t.requires_grad for t in (rows, pairs.gates, A, B)):
        out = _Grouped.apply(rows, A, B, *pairs)
        assert isinstance(out, Tensor)
    else:
        out = _forward(rows, A, B, pairs)[0]
    return out.view(*x.shape[:-1], B.shape[2])


def _chunks(pairs: Pairs, width: int) -> Iterator[tuple[slice, slice, Pairs]]:
    """Pairs, experts and `Pairs` of parts that stay in a CPU's cache while several products go over them.

    Nothing as large as all pairs is made then. Elsewhere, and in a trace, one part: where groups end is known there
    only on the device.
    """
    count, size = pairs.tokens.shape[0], max(1, IN_CACHE // width)
    if pairs.ends.device.type != "cpu" or torch.compiler.is_compiling() or count <= size:
        yield slice(None), slice(None), pairs
        return
    ends = pairs.ends.tolist()
    for start in range(0, count, size):
        stop = min(start + size, count)
        some, experts = slice(start, stop), slice(bisect_right(ends, start), bisect_left(ends, stop) + 1)
        inside = (pairs.ends[experts] - start).clamp(max=stop - start)
        yield some, experts, Pairs(pairs.tokens[some], pairs.gates[some], inside)


def _forward(rows: Tensor, A: Tensor, B: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The sum [N, d_out], and A x of the pairs [P, r]."""
    out, lows = rows.new_zeros(rows.shape[0], B.shape[2]), []
    for _, experts, part in _chunks(pairs, max(A.shape[2], B.shape[2])):
        low = grouped_mm(rows.index_select(0, part.tokens), A[experts].transpose(1, 2), part.ends)
        out.index_add_(0, part.tokens, grouped_mm(_gated(low, part.gates), B[experts], part.ends))
        lows.append(low)
    return out, lows[0] if len(lows) == 1 else torch.cat(lows)


def _gated(low: Tensor, gates: Tensor) -> Tensor:
    """One rounding."""
    return (low * gates[:, None]).to(low.dtype)


class _Grouped(Function):
    """`_forward` with gradients: for x, the gates, and the factors if they train."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, A: Tensor, B: Tensor, *pairs: Tensor) -> Tensor:
        out, low = _forward(rows, A, B, Pairs(*pairs))
        trains = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(rows if trains else None, low, A, B, *pairs)
        ctx.tokens = rows.shape[0]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*once(_backward(ctx, grads[0].contiguous())), None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of rows, A, B, tokens (none) and gates."""
    rows, low, A, B, *parts = ctx.saved_tensors
    pairs = Pairs(*parts)
    for_rows, for_A, for_B, _, for_gates = ctx.needs_input_grad[:5]
    with torch.no_grad(), without_autocast(grad):
        d_rows = grad.new_zeros(ctx.tokens, A.shape[2]) if for_rows else None
        d_A = torch.zeros_like(A, memory_format=torch.contiguous_format) if for_A else None
        d_B = torch.zeros_like(B, memory_format=torch.contiguous_format) if for_B else None
        d_gates = torch.empty_like(pairs.gates) if for_gates else None
        for some, experts, part in _chunks(pairs, max(A.shape[2], B.shape[2])):
            here, seen = low[some], grad.index_select(0, part.tokens)
            pull = grouped_mm(seen, B[experts].transpose(1, 2), part.ends)  # g
            if d_gates is not None:
                d_gates[some] = (pull.to(d_gates.dtype) * here).sum(-1)
            if d_B is not None:
                d_B[experts] += grouped_outer(_gated(here, part.gates), seen, part.ends)
            pull = _gated(pull, part.gates)
            if d_rows is not None:
                d_rows.index_add_(0, part.tokens, grouped_mm(pull, A[experts], part.ends))
            if d_A is not None:
                d_A[experts] += grouped_outer(pull, rows.index_select(0, part.tokens), part.ends)
    return d_rows, d_A, d_B, None, d_gates
