"""Put mixture layers into a backbone, with every expert checked against the modules that it adapts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from mole.adapters import Adapter
from mole.backbones.modules import in_out_features, replace_module
from mole.mixtures.adapter_mixture import MixtureLayer
from mole.mixtures.banks import LoraBank
from mole.registry import nearest
from mole.routing import RoutingContext


def wrap(
    backbone: PreTrainedModel, experts: Mapping[str, Adapter], context: RoutingContext, kernel: str
) -> dict[str, MixtureLayer]:
    """A mixture at every module that some expert adapts: path → layer, in the order of `named_modules()`.

    Raises ValueError, before anything is replaced, if an expert names a module that the backbone lacks or one of
    another shape.
    """
    wanted = {path for adapter in experts.values() for path in adapter.modules}
    modules = {path: module for path, module in backbone.named_modules() if path in wanted}
    _check(backbone, experts, dict(modules))
    layers = {}
    for path, module in modules.items():
        here = {i: a.modules[path] for i, a in enumerate(experts.values()) if path in a.modules}
        parameter = next(module.parameters())
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32  # quantised modules
        bank = LoraBank(here, len(experts), dtype=dtype, kernel=kernel).to(parameter.device)
        layers[path] = MixtureLayer(module, bank, path, context)
    for path, layer in layers.items():
        replace_module(backbone, path, layer)
    return layers


def _check(backbone: PreTrainedModel, experts: Mapping[str, Adapter], modules: dict) -> None:
    for name, adapter in experts.items():
        if not adapter.modules:
            raise ValueError(f"expert {name!r} adapts no module at all")
        for path, weights in adapter.modules.items():
            if path not in modules:
                near = nearest(path, [p for p, _ in backbone.named_modules()])
                raise ValueError(f"expert {name!r} adapts {path!r}, which this backbone lacks (nearest: {near})")
            made_for, here = (weights.A.shape[1], weights.B.shape[0]), in_out_features(modules[path])
            if made_for != here:
                raise ValueError(
                    f"expert {name!r} at {path}: made for {made_for[0]} → {made_for[1]} features, "
                    f"the backbone has {here[0]} → {here[1]}"
                )
