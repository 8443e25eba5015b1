"""Folded kernel: one set of weights for all tokens, multiplied into the factors; experts of weight 0 do no work."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mole.kernels.precision import autocast_dtype, without_autocast
from mole.kernels.stack import LoraStack, over_all
from mole.kernels.stacked import stacked


def folded(
    x: Tensor, stack: LoraStack, weights: Tensor, base_out: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    """base_out + Σ over the experts with w_e ≠ 0 of w_e s_e B_e A_e x; shapes as for every kernel, `weights` [1, 1, K].

    Weights that train keep every expert at work: at 0 there is a gradient too. Raises ValueError for other weights.
    """
    if weights.shape[0] != 1 or weights.shape[1] != 1 or (ids is not None and ids.numel() != ids.shape[-1]):
        raise ValueError(
            f"kernel=folded serves weights that are the same for all tokens, [1, 1, K]; got {tuple(weights.shape)}: "
            "use kernel=auto"
        )
    weights = over_all(weights, ids, stack.num_experts)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and weights.requires_grad):
        return stacked(x, stack, weights, base_out)
    active = [place for place, weight in enumerate(weights.flatten().tolist()) if weight != 0]
    if not active:
        return x.new_zeros(*x.shape[:-1], stack.B.shape[0]) if base_out is None else base_out.clone()
    part = stack.part(active)
    gates = weights if part is stack else weights[..., active]
    rows = x.numel() // x.shape[-1]
    if rows <= part.B.shape[0] or (torch.is_grad_enabled() and (part.A.requires_grad or part.B.requires_grad)):
        return stacked(x, part, gates, base_out)  # gates what lies between the factors, as that is smaller
    x = x.to(autocast_dtype(x) or x.dtype)
    with without_autocast(x):
        columns = (gates * part.scales).flatten().index_select(0, part.column_experts())
        B = (part.B * columns).to(x.dtype)
        out = F.linear(F.linear(x, part.A.to(x.dtype)), B)
    return out if base_out is None else (base_out + out.view(base_out.shape)).to(base_out.dtype)
