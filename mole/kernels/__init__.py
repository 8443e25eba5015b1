"""Products over many experts: the reference loop and faster forms of it, one signature.

kernel(x, stack, weights, base_out=None, ids=None) -> base_out + Σ_e w_e s_e B_e A_e x

`x`        [B, T, d_in].
`stack`    LoraStack of n experts.
`weights`  float32 [1|B, 1|T, K] of the experts `ids`; a leading 1 is shared by all examples or tokens.
`ids`      int64, broadcastable to `weights`, places in the stack; a repeated one adds up, one outside 0 … n-1 is
           nobody's. None: K is n, in the order of the stack.
`base_out` as many vectors [d_out] in any leading shape → the result's shape and dtype; it is not changed. None: the sum
           alone, [B, T, d_out] in the dtype of the computation.

`parameters` has the same signature and another sum: (Σ_e w_e s_e B_e)(Σ_e w_e A_e) x.
"""

from collections.abc import Callable

from torch import Tensor

from mole.kernels.auto import pick
from mole.kernels.folded import folded
from mole.kernels.grouped import grouped
from mole.kernels.loop import loop
from mole.kernels.parameters import check_blocks, check_ranks, parameters
from mole.kernels.segments import segments
from mole.kernels.stack import LoraStack, columns_of, over_all, spread_of
from mole.kernels.stacked import inner, stacked
from mole.registry import unknown

Kernel = Callable[..., Tensor]
KERNELS: dict[str, Kernel] = {
    "loop": loop,
    "stacked": stacked,
    "grouped": grouped,
    "segments": segments,
    "folded": folded,
}
SPARSE = frozenset({"loop", "grouped", "segments"})  # work on the chosen experts only, by their ids

__all__ = [
    "KERNELS",
    "SPARSE",
    "Kernel",
    "LoraStack",
    "check_blocks",
    "check_kernel",
    "check_ranks",
    "columns_of",
    "folded",
    "grouped",
    "inner",
    "loop",
    "over_all",
    "parameters",
    "pick",
    "segments",
    "spread_of",
    "stacked",
]


def check_kernel(name: str) -> str:
    """The name itself. Raises ValueError unless it is a kernel's, or `auto`: the fastest for each routing."""
    if name != "auto" and name not in KERNELS:
        raise ValueError(unknown("kernel", name, [*KERNELS, "auto"]))
    return name
