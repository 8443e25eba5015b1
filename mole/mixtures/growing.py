"""Change the experts of a mixture and keep what its router has learned about those that stay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from mole.adapters import Adapter
from mole.mixtures.model import MultiExpertModel
from mole.mixtures.wrapping import MixtureOptions
from mole.routers import PrototypeRouter, Router

# Fields of routers that change neither what they have learned nor its shape; Poly carries its rows by task.
_FREE = frozenset(
    {
        *("lr", "weight_decay", "expert_dropout", "dropout", "kl", "value_reg", "center_momentum"),
        *("temperature", "top_k", "norm_topk", "top_k_softmax", "missing", "min_confidence", "log_every_steps"),
        *("noise", "noise_eps", "noise_tau", "noise_tau_end", "noise_steps", "init", "init_std", "init_expert"),
        *("task_names", "init_task", "unknown", "relaxed_bernoulli", "bernoulli_temperature"),
        *("gate_refresh", "gate_freeze_after", "from_folder"),
    }
)


@dataclass(frozen=True)
class Parts:
    """A mixture taken apart: its backbone is free again.

    `experts` name → adapter, with tensors of its own; `routers` group → router ("" the one of the whole model);
    `trained` path → tensors of a whole module that was trained with the router; `flex` site → those of a flex adapter.
    """

    backbone: Any
    experts: dict[str, Adapter]
    tasks: dict[str, tuple[str, ...]]
    router_config: Any
    options: MixtureOptions
    routers: dict[str, Router]
    trained: dict[str, dict[str, Tensor]]
    flex: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def take_apart(model: MultiExpertModel) -> Parts:
    """The parts of `model`, which is of no use afterwards."""
    parts = Parts(
        backbone=model.backbone,
        experts=model.adapters(),
        tasks=dict(zip(model.expert_names, model.shape.expert_tasks, strict=True)),
        router_config=model.router_config,
        options=model.options,
        routers=routers_by_group(model),
        trained={path: dict(module.state_dict()) for path, module in model.trained_modules().items()},
        flex={site: dict(layer.flex.state_dict()) for site, layer in model.layers.items() if layer.flex is not None},
    )
    model.unload()
    return parts


def put_together(
    parts: Parts,
    experts: Mapping[str, Adapter],
    tasks: Mapping[str, tuple[str, ...]],
    *,
    replaced: Collection[str] = (),
    taught: bool = False,
    **options: Any,
) -> MultiExpertModel:
    """A mixture of `experts`, in this order, with the router of `parts`, in eval mode with nothing trainable.

    Of an expert that stays, and of one that was `replaced` by a newer one, the router keeps what it has learned; what
    it computes from an expert's weights is computed anew; of a new expert it knows what it knew at its start. Raises
    ValueError if the router does not fit the experts, or would need data for those that are new.
    """
    model = MultiExpertModel(
        parts.backbone,
        experts,
        parts.router_config,
        tasks=tasks,
        train="none",
        **{"kernel": parts.options.kernel, **parts.options.as_saved(), **options},
    )
    try:
        carry(model, parts, replaced=replaced, taught=taught)
    except ValueError:
        model.unload()
        raise
    return model.eval()


def carry(model: MultiExpertModel, parts: Parts, *, replaced: Collection[str] = (), taught: bool = False) -> None:
    """Hands what the routers of `parts` know on to those of `model`, which `check_router` has found to fit.

    `taught`: routers by prototypes are about to be shown data of the new experts and of those `replaced`.
    """
    known = set(parts.experts) - set(replaced)
    strangers = [name for name in model.expert_names if name not in known]
    for group, router in routers_by_group(model).items():
        by_data = "prototypes" in router.needs
        learns = by_data and isinstance(router, PrototypeRouter)
        if taught and not learns:
            raise ValueError(f"dataset: router={model.router_config.name} is shown no data of experts that come in")
        if strangers and by_data and not taught:
            way = "give mole edit-moe a dataset of their tasks, or " if learns else ""
            raise ValueError(
                f"router={model.router_config.name} knows each expert by data, and has none for "
                f"{', '.join(strangers)}: {way}build the mixture anew with mole build-moe and a dataset"
            )
        if (old := parts.routers.get(group)) is not None:
            router.carry(_forgetting(old, replaced) if by_data or "experts" in router.needs else old)
    for path, module in model.trained_modules().items():
        if path in parts.trained:
            module.load_state_dict(parts.trained[path])
    for site, layer in model.layers.items():
        if layer.flex is not None and site in parts.flex:
            layer.flex.load_state_dict(parts.flex[site])


def check_router(old: Any, new: Any) -> None:
    """Raises ValueError, naming the fields, if a router of config `new` cannot go on with what one of `old` knows."""
    if old.name != new.name:
        raise ValueError(f"its router is {old.name}, and {new.name} is given: set router={old.name}")
    differ = [f.name for f in fields(old) if getattr(old, f.name) != getattr(new, f.name) and f.name not in _FREE]
    if differ:
        shown = ", ".join(f"router.{name}={_written(getattr(old, name))}" for name in differ)
        given = ", ".join(f"{name}={_written(getattr(new, name))}" for name in differ)
        raise ValueError(f"its router was built with {shown}, and {given} is given: give it those again")


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def routers_by_group(model: MultiExpertModel) -> dict[str, Router]:
    """Group → router; "" the one of the whole model."""
    if model.router is not None:
        return {"": model.router}
    found = {group: model.layers[sites[0]].router for group, sites in model.groups.items()}
    return {group: router for group, router in found.items() if router is not None}


def _forgetting(old: Router, names: Collection[str]) -> Router:
    """`old` with other names for these experts, so that none of theirs is taken for the new ones'."""
    renamed = tuple(f"{name} (replaced)" if name in names else name for name in old.shape.expert_names)
    old.shape = replace(old.shape, expert_names=renamed)
    return old
