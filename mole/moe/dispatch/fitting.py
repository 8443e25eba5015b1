"""Which back-ends can run given experts, and why not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mole.moe.dispatch.grouped import fits, grouped
from mole.moe.dispatch.plan import ExpertPlan
from mole.moe.dispatch.recipes import Known, known
from mole.moe.dispatch.reference import reference
from mole.moe.dispatch.stacked import TooDeepError, stacked
from mole.moe.experts import architecture
from mole.moe.quiet import quietly

NAMED: tuple[str, ...] = ("vmap", "grouped", "stacked")
TRIED = 3  # tokens
CLOSE, COARSE = 1e-4, 5e-2


@dataclass(frozen=True)
class Fitness:
    """`reasons` back-end → why it cannot run the experts, "" if it can. `linear`: they are linear maps; `size`: the
    parameters of one.
    """

    reasons: dict[str, str]
    linear: bool = False
    size: int = 0

    def can(self, name: str) -> bool:
        """Whether the back-end can run the experts."""
        return not self.reasons.get(name)


def fitness(plan: ExpertPlan, x: Tensor | None) -> Fitness:
    """What can run these experts.

    With `x` [N, d], which gives width and dtype, a recipe that somebody wrote for a class is compared with the class;
    without, only the structure is looked at.
    """
    if not plan.packed:
        return Fitness(dict.fromkeys(NAMED, "experts see whole samples"))
    kinds = {architecture(expert) for expert in plan.experts}
    if len(kinds) > 1:
        return Fitness(dict.fromkeys(NAMED, "the experts' architectures differ"))
    reasons = dict.fromkeys(NAMED, "")
    expert = plan.experts[0]
    found = known(expert)
    if next(expert.parameters(), None) is None:
        reasons["vmap"] = "the experts have no parameters to stack"
    if any(not parameter.is_floating_point() for parameter in expert.parameters()):
        reasons["vmap"] = "the experts are quantised"
    if not plan.plain:
        reasons |= dict.fromkeys(("grouped", "stacked"), "expert_forward is overridden")
    elif found is None:
        other = next((type(part) for part in expert.modules() if not list(part.children())), type(expert))
        kind = " with ".join(dict.fromkeys([type(expert).__name__, other.__name__]))
        reasons |= dict.fromkeys(("grouped", "stacked"), f"{kind} is not supported")
    else:
        _of_recipe(plan, found, expert, x, reasons)
    size = sum(parameter.numel() for parameter in expert.parameters())
    return Fitness(reasons, found is not None and found.linear, size)


def _of_recipe(plan: ExpertPlan, found: Known, expert: nn.Module, x: Tensor | None, reasons: dict[str, str]) -> None:
    dtype = next(expert.parameters(), torch.zeros(())).dtype
    if not fits(dtype):
        reasons["grouped"] = f"dtype {str(dtype).removeprefix('torch.')}"
    if x is None:
        return
    if torch.compiler.is_compiling():
        wait = "not compared yet: call the block once before it is compiled"
        for name, sure in (("grouped", found.sure), ("stacked", found.sure and found.shallow)):
            reasons[name] = reasons[name] or ("" if sure else wait)
        return
    for name, backend, sure in (("grouped", grouped, found.sure), ("stacked", stacked, found.sure and found.shallow)):
        if not reasons[name] and not sure:
            reasons[name] = _compared(plan, backend, x)


def _compared(plan: ExpertPlan, backend: object, x: Tensor) -> str:
    """Why a back-end does not do what the experts' own forward does, on a few tokens; "" if it does."""
    some = replace(plan, experts=list(plan.experts)[:2])
    count = len(some.experts)
    with quietly(some.experts, x.device):
        rows = torch.randn(TRIED, x.shape[-1], generator=torch.Generator().manual_seed(0)).to(x)
        ids = torch.arange(count, device=x.device).expand(TRIED, count)
        gates = torch.linspace(0.2, 0.9, TRIED * count, device=x.device).view(TRIED, count)
        try:
            one, other = backend(some, rows, ids, gates), reference(some, rows, ids, gates)  # type: ignore[operator]
        except (TooDeepError, AttributeError, TypeError, RuntimeError, ValueError) as error:
            return f"{type(plan.experts[0]).__name__}: {str(error)[:160]}"
    coarse = torch.finfo(other.dtype).eps > 1e-5
    size = other.float().abs().max().clamp_min(1.0)
    if one.shape != other.shape or (one.float() - other.float()).abs().max() > (COARSE if coarse else CLOSE) * size:
        return f"{type(plan.experts[0]).__name__} computes something else than its layers' names say"
    return ""


def check_backend(name: str, found: Fitness) -> None:
    """Raises ValueError if the back-end that was asked for cannot run the experts."""
    if not found.can(name):
        raise ValueError(f"backend={name} cannot run these experts: {found.reasons[name]}; use backend=auto or loop")
