"""The call of a back-end: by name, or the fastest one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mole.moe.dispatch.loop import loop
from mole.moe.dispatch.plan import ExpertPlan
from mole.moe.dispatch.reference import reference
from mole.moe.dispatch.vmapped import vmapped
from mole.moe.dispatch.whole import sequences, zeros

BACKENDS: dict[str, Callable[..., Tensor]] = {"loop": loop, "reference": reference, "vmap": vmapped}


def pick(plan: ExpertPlan, x: Tensor, k: int, fitness: dict[str, str], limit: int | None) -> str:
    """The fastest back-end for `x` [N, *in] with k slots for each row."""
    return "loop"


def dispatched(
    plan: ExpertPlan,
    x: Tensor,
    slots: tuple[Tensor, Tensor],
    limit: int | None,
    backend: str,
    fitness: dict[str, str] | None,
) -> tuple[Tensor, str]:
    """Σ over the slots (ids and weights [N, K]) of gate · expert, and the name of the back-end that made it."""
    ids, weights = slots
    if backend == "auto":
        backend = pick(plan, x, ids.shape[1], fitness or {}, limit)
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
