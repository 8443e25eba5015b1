"""Start the routers of an adapter_fusion mixture from a fusion that AdapterHub trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mole.adapters.adapterhub_fusion import Fusion, read_fusion


def start_from_fusion(model: Any) -> None:
    """Copies the fusion in the folder `router_config.from_folder` into the routers; the config then names none.

    Which expert is which does not matter: all share its maps. Raises ValueError for a fusion that computes something
    else, is at other modules or of another width, and over experts that read x (par_bn): AdapterHub adds x once more.
    """
    config = model.router_config
    fusion = read_fusion(config.from_folder)
    try:
        _check(model, fusion)
    except ValueError as error:
        raise ValueError(f"router.from_folder={config.from_folder}: {error}") from None
    model.router_config = replace(config, from_folder=None)
    with torch.no_grad():
        for site, router in model.routers().items():
            router.config = model.router_config
            for name, parameter in router.named_parameters():
                parameter.copy_(fusion.sites[site][name])


def _check(model: Any, fusion: Fusion) -> None:
    config, routers = model.router_config, model.routers()
    if config.value != fusion.value:
        raise ValueError(
            f"it {'maps' if fusion.value else 'does not map'} the mix: set router.value={str(fusion.value).lower()}"
        )
    if config.query != "output":
        raise ValueError(f"its query is the module's own output, and router.query={config.query}")
    if odd := sorted(set(routers) ^ set(fusion.sites)):
        raise ValueError(
            f"it is at {len(fusion.sites)} modules, the experts are at {len(routers)}; "
            f"{odd[0]} is of {'the experts' if odd[0] in routers else 'the fusion'} alone"
        )
    for site, router in routers.items():
        found = (model.layers[site].bank.weights(index) for index in range(model.shape.num_experts))
        reads = {getattr(weights, "reads", None) for weights in found if weights is not None}
        if reads & {"x", "input"}:
            raise ValueError(f"{site}: experts that read x (par_bn): there AdapterHub's fusion adds x twice")
        if len(reads) > 1:
            raise ValueError(f"{site}: experts that read unlike values ({', '.join(map(str, reads))})")
        for name, parameter in router.named_parameters():
            if parameter.shape != fusion.sites[site][name].shape:
                shapes = tuple(fusion.sites[site][name].shape), tuple(parameter.shape)
                raise ValueError(f"{site}: {name} has shape {shapes[0]}, the router's {shapes[1]}")
