"""Reference kernel: one expert after another, straightforward autograd. The oracle of every faster kernel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from mole.kernels.precision import autocast_dtype, without_autocast
from mole.kernels.stack import LoraStack


def loop(
    x: Tensor,
    stack: LoraStack,
    weights: Tensor,
    base_out: Tensor | None = None,
    *,
    dropout: Sequence[float] | None = None,
) -> Tensor:
    """base_out + Σ_e w_e s_e B_e A_e x, expert by expert.

    `x` [B, T, d_in]; `weights` float32 [1|B, 1|T, n] over the experts of `stack`; `base_out` as many vectors [d_out]
    in any leading shape → its shape and dtype. Without `base_out`: the sum, [B, T, d_out].
    `dropout` gives each expert a mask of its own on x, with its own rate.
    """
    x = x.to(autocast_dtype(x) or x.dtype)
    with without_autocast(x):
        out = x.new_zeros(*x.shape[:-1], stack.B.shape[0])
        for expert, part in enumerate(stack.slices()):
            seen = F.dropout(x, dropout[expert]) if dropout is not None else x
            low = seen @ stack.A[part].to(x.dtype).T
            gated = (low * (weights[..., expert, None] * stack.scales[expert])).to(x.dtype)
            out = out + gated @ stack.B[:, part].to(x.dtype).T
    return out if base_out is None else (base_out + out.reshape(base_out.shape)).to(base_out.dtype)
