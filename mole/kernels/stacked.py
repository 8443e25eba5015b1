"""Stacked kernel: all experts of a layer in two matrix products, weights applied between them.

    h = x Aᵀ  [n, R];    u = h ⊙ (w s)[column → expert];    y = u Bᵀ

As the maps are linear this equals gating the input of every expert. Nothing of size [tokens, experts, d] is made.
"""

from torch import Tensor

from mole.kernels.stack import LoraStack


def stacked(x: Tensor, stack: LoraStack, weights: Tensor) -> Tensor:
    """Σ_e w_e s_e B_e A_e x in two products.

    `x` [B, T, d_in]; `weights` float32 [1|B, 1|T, n] over the experts of `stack` → [B, T, d_out], in x's dtype.
    """
    low = x @ stack.A.to(x.dtype).T
    gates = weights * stack.scales  # float32 for the usual dtypes: one rounding, in the product below
    if stack.equal_ranks:
        grouped = low.unflatten(-1, (stack.num_experts, stack.ranks[0]))
        gated = (grouped * gates[..., None]).flatten(-2)
    else:
        gated = low * gates.index_select(-1, stack.column_experts())
    return gated.to(x.dtype) @ stack.B.to(x.dtype).T
