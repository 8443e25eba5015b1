"""Which back-ends can run given experts, and why not."""

from __future__ import annotations

from torch import Tensor

from mole.moe.dispatch.plan import ExpertPlan
from mole.moe.experts import architecture

NAMED = ("vmap", "grouped", "stacked")


def fitness(plan: ExpertPlan, x: Tensor | None) -> dict[str, str]:
    """Back-end → why it cannot run these experts, "" if it can. Without `x` only what their structure tells."""
    if not plan.packed:
        return dict.fromkeys(NAMED, "experts see whole samples")
    kinds = {architecture(expert) for expert in plan.experts}
    if len(kinds) > 1:
        return dict.fromkeys(NAMED, "the experts' architectures differ")
    return {"vmap": "", "grouped": "not written", "stacked": "not written"}


def check_backend(name: str, found: dict[str, str]) -> None:
    """Raises ValueError if the back-end that was asked for cannot run the experts."""
    if found.get(name):
        raise ValueError(f"backend={name} cannot run these experts: {found[name]}; use backend=auto or loop")
