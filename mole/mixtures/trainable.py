"""What of a mixture is trained: router, experts, heads, flex adapters, and with some modes of a router the backbone."""

from __future__ import annotations

from typing import Any

from torch import nn

from mole.registry import unknown

TRAINS = ("router", "experts", "both", "none")
WITH_BACKBONE = ("base_ft", "full_ft")  # modes of a router


def set_trainable(model: Any, train: str) -> None:
    """As `MultiExpertModel.set_trainable`."""
    if train not in TRAINS:
        raise ValueError(unknown("train", train, TRAINS))
    mode, learns = getattr(model.router_config, "mode", None), train in ("router", "both")
    model.trains_backbone = learns and mode in WITH_BACKBONE
    model.backbone.requires_grad_(model.trains_backbone)
    model.trains_experts = train in ("experts", "both") or (learns and mode == "full_ft")
    for standing in model.stand_ins.values():  # what they stand for is not used
        standing.base.requires_grad_(False)
    for layer in model.layers.values():
        layer.bank.requires_grad_(model.trains_experts)
        if layer.flex is not None:
            layer.flex.requires_grad_(learns)
    for module in model.trained_modules().values():
        module.requires_grad_(train != "none")
    for router in model.routers().values():
        router.requires_grad_(learns)


def backbone_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The backbone's own parameters by name, as far as they are trained: with router.mode base_ft and full_ft."""
    if getattr(model.router_config, "mode", None) not in WITH_BACKBONE:
        return {}
    added = [*model.routers().values(), *model.trained_modules().values()]
    added += [part for layer in model.layers.values() for part in (layer.bank, layer.flex) if part is not None]
    added += [standing.base for standing in model.stand_ins.values()]
    others = {id(p) for module in added for p in module.parameters()}
    return {name: p for name, p in model.backbone.named_parameters() if id(p) not in others}


def parameter_settings(model: Any) -> dict[str, dict[str, float]]:
    """As `MultiExpertModel.parameter_settings`."""
    wanted = {name: getattr(model.router_config, name, None) for name in ("lr", "weight_decay")}
    own = {name: value for name, value in wanted.items() if value is not None}
    if any(not router.clipped for router in model.routers().values()):
        own["clip"] = 0.0
    routed = {id(parameter) for router in model.routers().values() for parameter in router.parameters()}
    return {name: own for name, p in model.named_parameters() if own and id(p) in routed}
