"""Reference kernel: one expert after another, straightforward autograd. The oracle of every faster kernel."""

from torch import Tensor

from mole.kernels.stack import LoraStack


def loop(x: Tensor, stack: LoraStack, weights: Tensor) -> Tensor:
    """Σ_e w_e s_e B_e A_e x, expert by expert.

    `x` [B, T, d_in]; `weights` float32 [1|B, 1|T, n] over the experts of `stack` → [B, T, d_out], in x's dtype.
    """
    out = x.new_zeros(*x.shape[:-1], stack.B.shape[0])
    for expert, part in enumerate(stack.slices()):
        low = x @ stack.A[part].to(x.dtype).T
        gated = (low * (weights[..., expert, None] * stack.scales[expert])).to(x.dtype)
        out = out + gated @ stack.B[:, part].to(x.dtype).T
    return out
