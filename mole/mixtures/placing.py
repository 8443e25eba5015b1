"""Routings as the layers of a model spend them: for the rows of the batch, on the devices of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mole.backbones.modules import device_of
from mole.routing import Packing, Routing

SPARSE = 12  # experts for each one chosen


def placed(
    model: Any, routed: Routing | tuple[Routing, ...], rows: int, packing: Packing | None = None
) -> dict[str, Routing]:
    """Site → routing, of one for all sites or one for each, for a batch of `rows`; or for those of `packing`."""
    routings = routed if isinstance(routed, tuple) else (routed,) * model.shape.num_sites
    if packing is None:
        made = {id(routing): routing.for_rows(rows) for routing in routings}
    else:
        made = {id(routing): packing.together(routing) for routing in routings}
    found = {site: made[id(routing)] for site, routing in zip(model.sites, routings, strict=True)}
    if len(set((getattr(model.backbone, "hf_device_map", None) or {}).values())) < 2:
        return spread(found, model.shape.num_experts)
    devices = {site: device_of(layer.bank) for site, layer in model.layers.items()}
    return on_devices(spread(found, model.shape.num_experts), devices)


def spread(routings: dict[str, Routing], num_experts: int) -> dict[str, Routing]:
    """The routings with their weights over all experts: made for all layers in one go, not once in each of them."""
    sparse = {id(routing): routing for routing in routings.values() if routing.expert_ids is not None}
    # Compared, not put in a set: hashing a length would fix it in a trace, and each new length would be traced anew.
    first = next(iter(sparse.values()), None)
    if first is None or any(r.weights.shape != first.weights.shape for r in sparse.values()):
        return routings
    if num_experts > SPARSE * first.weights.shape[-1] and not torch.compiler.is_compiling():
        return routings  # layers then compute the chosen experts only
    weights = torch.cat([r.weights for r in sparse.values()], dim=1)
    ids = torch.cat([r.expert_ids.expand_as(r.weights) for r in sparse.values()], dim=1)  # type: ignore[union-attr]
    parts = Routing(weights, ids).dense(num_experts).split(first.weights.shape[1], dim=1)
    made = {key: replace(r, spread=part) for (key, r), part in zip(sparse.items(), parts, strict=True)}
    return {site: made.get(id(routing), routing) for site, routing in routings.items()}


def on_devices(routings: Mapping[str, Routing], devices: Mapping[str, torch.device]) -> dict[str, Routing]:
    """The routings on these devices; each is copied to a device once, however many layers are there."""
    copies: dict[tuple[int, torch.device], Routing] = {}
    for site, routing in routings.items():
        key = (id(routing), devices[site])
        if key not in copies:
            copies[key] = _moved(routing, devices[site])
    return {site: copies[id(routing), devices[site]] for site, routing in routings.items()}


def _moved(routing: Routing, device: torch.device) -> Routing:
    if routing.weights.device == device:
        return routing
    parts = {name: getattr(routing, name) for name in ("weights", "expert_ids", "spread", "base")}
    return replace(routing, **{name: None if part is None else part.to(device) for name, part in parts.items()})


def batch_rows(inputs: Mapping[str, Any]) -> int:
    """How many rows the inputs of a forward have."""
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values")
    for name in names:
        if isinstance(inputs.get(name), Tensor):
            return inputs[name].shape[0]
    raise ValueError(f"a forward needs one of {', '.join(names)}; got {', '.join(inputs) or 'nothing'}")
