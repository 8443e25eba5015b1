"""Mixed parameters: y = base + (Σ_e w_e s_e B_e)(Σ_e w_e A_e) x, one adapter made of all for each example or token.

SMEAR (Muqeeth et al. 2023, arXiv 2306.03745) and Poly (Ponti et al. 2022, arXiv 2202.13914). Weights of examples are
spent on the factors, of which there is then one pair per example. Weights of tokens never are: that would be a matrix
per token. The same comes out of

    h̄_t = Σ_e w_te A_e x_t;     y_t = base_t + Σ_e w_te s_e B_e h̄_t

which is two products with all factors, as in the stacked kernel. With weights [.., Q, n] the features fall into Q
blocks, each with weights of its own (Multi-Head Routing, Caccia et al. 2022, arXiv 2211.03831); what lies between the
factors is shared by all blocks. Legend: N = B·T tokens, n experts of one rank r.
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


def parameters(
    x: Tensor, stack: LoraStack, weights: Tensor, base_out: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    """base_out + (Σ_e w_e s_e B_e)(Σ_e w_e A_e) x.

    Shapes as for every kernel, and `weights` [1|B, 1|T, Q, K] too. Raises ValueError for unequal ranks, and for blocks
    that do not divide the features. With weights of tokens differentiable once.
    """
    check_ranks(stack.ranks)
    weights = over_all(weights, ids, stack.num_experts)
    if weights.dim() == 4:
        check_blocks(weights.shape[2], stack.A.shape[1], stack.B.shape[0])
        if weights.shape[2] == 1:
            weights = weights[:, :, 0]
    dtype = autocast_dtype(x) or x.dtype
    with without_autocast(x):
        A, B = stack.blocks()
        factors = A.to(dtype), B.to(dtype)
        mix = _by_example if weights.shape[1] == 1 else _by_token if weights.dim() == 3 else _by_token_and_block
        out = mix(x.to(dtype), *factors, weights, stack.scales)
    return out if base_out is None else (base_out + out.reshape(base_out.shape)).to(base_out.dtype)


def check_ranks(ranks: tuple[int, ...]) -> None:
    """Raises ValueError unless all experts have one rank."""
    if len(set(ranks)) > 1:
        raise ValueError(
            f"combine=parameters needs experts of one rank, here are {', '.join(map(str, sorted(set(ranks))))}: use "
            "combine=outputs"
        )


def check_blocks(blocks: int, d_in: int, d_out: int) -> None:
    """Raises ValueError if the features of a module do not fall into that many blocks."""
    if d_in % blocks or d_out % blocks:
        raise ValueError(f"a module of {d_in} → {d_out} features cannot be split into {blocks} blocks of equal size")


def _by_example(x: Tensor, A: Tensor, B: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """One adapter per example, or for all: `weights` [1|B, 1, (Q,) n]."""
    made_A = _mixed(A, weights[:, 0])
    made_B = _mixed(B, weights[:, 0] * scales)
    if len(made_A) == 1:
        return F.linear(x, made_A[0]) @ made_B[0]
    return x @ made_A.transpose(1, 2) @ made_B


def _mixed(factors: Tensor, weights: Tensor) -> Tensor:
    """`factors` [n, r, d], `weights` [b, n] or [b, Q, n] → [b, r, d]."""
    n, r, d = factors.shape
    weights = weights.to(factors.dtype)
    if weights.dim() == 2:
        return (weights @ factors.reshape(n, r * d)).view(-1, r, d)
    blocks = factors.reshape(n, r, weights.shape[1], -1)
    return torch.einsum("bqn,nrqd->brqd", weights, blocks).reshape(-1, r, d)


def _by_token(x: Tensor, A: Tensor, B: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """`weights` [1|B, T, n]."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, A, B, weights)):
        out = _ByToken.apply(x, A, B, weights, scales)
        assert isinstance(out, Tensor)
        return out
    return _forward(x, A, B, weights, scales)


def _forward(x: Tensor, A: Tensor, B: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    _, mean = _hidden(x, A, weights)
    return _spread(mean, weights * scales) @ B.flatten(0, 1)


def _hidden(x: Tensor, A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A_e x [B, T, n, r], and their weighted sum h̄ [B, T, r]."""
    low = F.linear(x, A.flatten(0, 1)).view(*x.shape[:-1], *A.shape[:2])
    return low, (low * weights[..., None]).sum(-2).to(x.dtype)


def _spread(low: Tensor, gates: Tensor) -> Tensor:
    """[B, T, r] with gates [1|B, 1|T, n] → [B, T, n·r], in the dtype of `low`."""
    return (low[..., None, :] * gates[..., None]).to(low.dtype).flatten(-2)


class _ByToken(Function):
    """`_forward` with gradients; only x and the weights are kept of the activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B, weights, scales)
        return _forward(x, A, B, weights, scales)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*once(_backward(ctx, grads[0])), None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, A, B and weights."""
    x, A, B, weights, scales = ctx.saved_tensors
    for_x, for_A, for_B, for_weights = ctx.needs_input_grad[:4]
    with torch.no_grad(), without_autocast(grad):
        low, mean = _hidden(x, A, weights)
        pull = F.linear(grad, B.flatten(0, 1)).view(low.shape)  # B_eᵀ dy
        gates = weights * scales
        d_mean = (pull * gates[..., None]).sum(-2)
        d_x = d_A = d_B = d_weights = None
        if for_weights:
            share = (pull.to(gates.dtype) * mean[..., None, :]).sum(-1) * scales
            d_weights = (share + (low.to(gates.dtype) * d_mean[..., None, :]).sum(-1)).sum_to_size(weights.shape)
        if for_x or for_A:
            d_low = _spread(d_mean.to(x.dtype), weights)
            d_x = d_low @ A.flatten(0, 1) if for_x else None
            d_A = (d_low.flatten(0, -2).t() @ x.flatten(0, -2)).view(A.shape) if for_A else None
        if for_B:
            d_B = (_spread(mean, gates).flatten(0, -2).t() @ grad.flatten(0, -2)).view(B.shape)
    return d_x, d_A, d_B, d_weights


def _by_token_and_block(x: Tensor, A: Tensor, B: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """`weights` [1|B, T, Q, n]; a vector [Q, n, r] per token lies between the factors."""
    blocks = weights.shape[2]
    low = torch.einsum("btqd,nrqd->btqnr", x.unflatten(-1, (blocks, -1)), A.unflatten(-1, (blocks, -1)))
    mean = (low * weights[..., None]).sum((-3, -2)).to(x.dtype)  # [B, T, r]
    gated = (mean[..., None, None, :] * (weights * scales)[..., None]).to(x.dtype)  # [B, T, Q, n, r]
    return torch.einsum("btqnr,nrqd->btqd", gated, B.unflatten(-1, (blocks, -1))).flatten(-2)
