"""Products over many experts: the reference loop and the faster form of it, one signature.

kernel(x [B, T, d_in], stack: LoraStack, weights [1|B, 1|T, n], base_out=None) -> base_out + Σ_e w_e s_e B_e A_e x,
or the sum alone, [B, T, d_out].
"""

from collections.abc import Callable

from torch import Tensor

from mole.kernels.fused import fused
from mole.kernels.loop import loop
from mole.kernels.stack import LoraStack, columns_of, spread_of
from mole.registry import unknown

Kernel = Callable[..., Tensor]
KERNELS: dict[str, Kernel] = {"loop": loop, "fused": fused}

__all__ = ["KERNELS", "Kernel", "LoraStack", "choose", "columns_of", "fused", "loop", "spread_of"]


def choose(name: str) -> Kernel:
    """The kernel of that name; `auto` is the fastest one, `fused`, in training and inference alike."""
    if name == "auto":
        return fused
    if name not in KERNELS:
        raise ValueError(unknown("kernel", name, [*KERNELS, "auto"]))
    return KERNELS[name]
