"""Whole modules that experts trained along (a classification head, norms …): what becomes of them in a mixture.

error          refuse such experts (the default: none of the ways below is right for everybody)
base           the backbone's own module
take:<expert>  that expert's module
mean           the average of the experts' modules
mix            M_0(x) + Σ w_e (M_e(x) − M_0(x)), exact, E modules large
train          one new copy of the backbone's module, trained with the router; train:<expert> starts as that expert's

`train` is about the heads of the backbone, where it has any that data asked for, whether experts trained one or not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mole.adapters import Adapter
from mole.mixtures.banks.modules import filled
from mole.registry import unknown
from mole.routing import RoutingContext

POLICIES = ("error", "base", "take:<expert>", "mean", "mix", "train", "train:<expert>")


class StandIn(nn.Module):
    """`module` where experts work, `base` where they do not; unknown attributes are those of `base`."""

    def __init__(self, base: nn.Module, module: nn.Module, context: RoutingContext):
        super().__init__()
        self.base = base
        self.module = module
        self.context = context

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        frame = self.context.current
        chosen = self.base if frame is None or not frame.experts_enabled else self.module
        return chosen(*args, **kwargs)


def check_policy(policy: str, experts: Mapping[str, Adapter]) -> None:
    """Raises ValueError for an unknown policy, and for `error` where an expert has whole modules."""
    name, _, expert = policy.partition(":")
    if (
        (name == "take" and not expert)
        or (expert and name not in ("take", "train"))
        or name not in ("error", "base", "take", "mean", "mix", "train")
    ):
        raise ValueError(unknown("modules_to_save", policy, list(POLICIES)))
    if expert and expert not in experts:
        raise ValueError(f"modules_to_save={policy}: {unknown('expert', expert, list(experts))}")
    if policy == "error":
        held = {name: adapter.full_modules for name, adapter in experts.items() if adapter.full_modules}
        if held:
            said = "; ".join(f"expert {name!r}: {', '.join(parts)}" for name, parts in held.items())
            raise ValueError(
                f"experts brought whole modules of their own ({said}); say what becomes of them with "
                f"modules_to_save={', '.join(POLICIES[1:])}"
            )


def stand_ins(
    modules: Mapping[str, nn.Module],
    experts: Mapping[str, Adapter],
    policy: str,
    context: RoutingContext,
    heads: Sequence[str] = (),
) -> dict[str, StandIn]:
    """Path → what stands there under take, mean and train; nothing under the other policies.

    `modules` are those of the backbone, by path; `heads` the paths of its heads. Raises ValueError for modules that do
    not fit the backbone's, or not each other, and for heads that are not there.
    """
    kind, _, taken = policy.partition(":")
    if kind not in ("take", "mean", "train"):
        return {}
    sources = [experts[taken]] if taken else list(experts.values())
    paths = list(dict.fromkeys(path for adapter in sources for path in adapter.full_modules))
    if kind == "train" and heads:
        paths = list(heads)
    made = {}
    for path in paths:
        tensors = [adapter.full_modules[path] for adapter in sources if path in adapter.full_modules]
        if path not in modules:
            raise ValueError(
                f"modules_to_save={policy}: the backbone has no {path}: has it the head that the data asks for?"
            )
        base = modules[path]
        try:
            if kind == "train" and not (taken and tensors):
                module = copy.deepcopy(base)
            else:
                module = filled(base, _mean(tensors))
        except ValueError as error:
            raise ValueError(f"modules_to_save={policy}: {path}: {error}") from error
        made[path] = StandIn(base, module.requires_grad_(False), context)
    return made


def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in parts]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"the experts' modules have unlike shapes: {shapes}")
    return {name: torch.stack([part[name].float() for part in parts]).mean(0) for name in parts[0]}
