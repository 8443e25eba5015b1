"""The call of a back-end: by name, or the fastest one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mole.moe.dispatch.fitting import Fitness
from mole.moe.dispatch.grouped import grouped
from mole.moe.dispatch.loop import loop
from mole.moe.dispatch.plan import ExpertPlan
from mole.moe.dispatch.reference import reference
from mole.moe.dispatch.stacked import stacked
from mole.moe.dispatch.vmapped import vmapped
from mole.moe.dispatch.whole import sequences, zeros

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "loop": loop,
    "reference": reference,
    "vmap": vmapped,
    "grouped": grouped,
    "stacked": stacked,
}
# Measured on a CPU with one thread, forward and backward; scripts/benchmarks/moe.py measures whether they still hold.
FEW = 256  # rows of an expert, below which a call of its own costs more than they do
SMALL = 40_000  # parameters of an expert, above which putting those of all experts together costs more than calls
DENSE = 6  # experts per slot, up to which all low-rank experts on all tokens cost less than sorting


def pick(plan: ExpertPlan, x: Tensor, k: int, fit: Fitness, limit: int | None) -> str:
    """The fastest back-end for `x` [N, *in], k slots for each row; `limit` rows that no expert exceeds, if known."""
    if torch.compiler.is_compiling():
        if fit.can("stacked"):
            return "stacked"
        return "vmap" if fit.can("vmap") and limit is not None else "loop"
    experts, slots = plan.num_experts, len(x) * k
    if x.dtype == torch.float64 or not fit.can("vmap") or slots < experts:
        return "loop"
    if fit.linear and fit.can("stacked") and 2 * fit.size <= x.shape[-1] ** 2 and experts <= DENSE * k:
        return "stacked"
    if fit.can("grouped") and (x.is_cuda or (slots < FEW * experts and fit.size <= SMALL)):
        return "grouped"
    return "loop"


def dispatched(
    plan: ExpertPlan,
    x: Tensor,
    slots: tuple[Tensor, Tensor],
    limit: int | None,
    backend: str,
    fitness: Fitness | None,
) -> tuple[Tensor, str]:
    """Σ over the slots (ids and weights [N, K]) of gate · expert, and the name of the back-end that made it."""
    ids, weights = slots
    if backend == "auto":
        backend = pick(plan, x, ids.shape[1], fitness, limit) if fitness is not None else "loop"
    if not len(x) and backend != "reference":
        backend = "loop"
    return BACKENDS[backend](plan, x, ids, weights, limit), backend


def dispatched_whole(
    plan: ExpertPlan,
    x: Tensor,
    slots: tuple[Tensor, Tensor],
    contract: str,
    masked: Callable[..., Any] | None,
) -> Tensor:
    """The same for experts that see more than a token: `contract` zeros or sequence."""
    if contract == "zeros":
        return zeros(plan, x, *slots)
    return sequences(plan, x, *slots, masked)
