"""Products over many experts: the reference loop and the faster forms of it, one signature.

kernel(x [B, T, d_in], stack: LoraStack, weights [1|B, 1|T, n]) -> [B, T, d_out]
"""

from collections.abc import Callable

from torch import Tensor

from mole.kernels.loop import loop
from mole.kernels.stack import LoraStack
from mole.kernels.stacked import stacked
from mole.registry import unknown

Kernel = Callable[[Tensor, LoraStack, Tensor], Tensor]
KERNELS: dict[str, Kernel] = {"loop": loop, "stacked": stacked}

__all__ = ["KERNELS", "Kernel", "LoraStack", "choose", "loop", "stacked"]


def choose(name: str) -> Kernel:
    """The kernel of that name; `auto` is the fastest one for dense weights, `stacked`."""
    if name == "auto":
        return stacked
    if name not in KERNELS:
        raise ValueError(unknown("kernel", name, [*KERNELS, "auto"]))
    return KERNELS[name]
