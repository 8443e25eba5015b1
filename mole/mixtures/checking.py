"""What an expert may adapt: every part of it is checked against the backbone before anything is wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mole.adapters import Adapter, LoraWeights
from mole.backbones.modules import input_output, is_offloaded, kind_of
from mole.mixtures.adapter_mixture import MixtureLayer
from mole.mixtures.output_mixture import OutputMixture, SplitMixture

_OFFERED = "a linear module, an embedding or a convolution"


def check(backbone: PreTrainedModel, experts: Mapping[str, Adapter], modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError, naming expert, module and reason, for what cannot be mixed. Names are those of `modules`."""
    for name, adapter in experts.items():
        if not adapter.modules:
            raise ValueError(f"expert {name!r} adapts no module at all")
        for path, weights in adapter.modules.items():
            if reason := _place(backbone, path, modules) or _part(backbone, modules[path], weights):
                raise ValueError(f"expert {name!r} at {path}: {reason}")
        for path in adapter.full_modules:
            inside = [site for site in adapter.modules if site == path or site.startswith(f"{path}.")]
            if inside:
                raise ValueError(f"expert {name!r} at {path}: the whole module is saved, and {inside[0]} adapted too")
        _check_offloaded(name, adapter, modules)
        _check_base_weights(name, adapter, modules)


def _check_offloaded(name: str, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """What is made of the backbone's own weights cannot be where these are brought for a forward only."""
    dora = [path for path, weights in adapter.modules.items() if getattr(weights, "magnitude", None) is not None]
    for path in (*dora, *adapter.biases, *adapter.full_modules, *adapter.base_weights):
        if any(map(is_offloaded, modules[path].modules())):
            raise ValueError(
                f"expert {name!r} at {path}: DoRA, trained biases and whole modules are made of the backbone's own "
                "weights, which are offloaded here: load it with a device_map that keeps this module on a device"
            )


def _place(backbone: PreTrainedModel, path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Why nothing can be mixed at that place; None if it can."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        above = modules[".".join(parts[:end])]
        if isinstance(above, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads the weights of its parts without calling them"
        if isinstance(above, nn.ModuleList) and parts[end - 1].endswith("experts"):
            return "it is inside one of the experts of a mixture-of-experts block, which sees some tokens only"
        foreign = isinstance(above, PreTrainedModel) and above.main_input_name != "input_ids"
        if foreign and backbone.main_input_name == "input_ids":
            return f"it is part of the tower for {above.main_input_name}, whose positions are no tokens of the text"
    if isinstance(modules[path], nn.MultiheadAttention):
        return "nn.MultiheadAttention is no single product: adapt other modules"
    if parts[-1] == "shared" and any(known.endswith("encoder.embed_tokens") for known in modules):
        return "it is never called: encoder.embed_tokens and decoder.embed_tokens read its weight"
    return None


def _part(backbone: PreTrainedModel, module: nn.Module, weights: Any) -> str | None:
    """Why these weights do not fit the module; None if they do."""
    if not isinstance(weights, LoraWeights):
        try:
            return weights.misfit(module, backbone)
        except ValueError as error:
            return str(error)
    kind = kind_of(module)
    if kind is None:
        return f"a {type(module).__name__} is not {_OFFERED}"
    if kind != weights.kind:
        return f"the weights are for {_article(weights.kind)}, the backbone has {_article(kind)} there"
    made_for, here = (weights.A.shape[1], weights.B.shape[0]), input_output(module)
    if made_for != here:
        return f"made for {made_for[0]} → {made_for[1]} features, the backbone has {here[0]} → {here[1]}"
    if kind == "embedding":
        return _embedding(module, weights)
    return _convolution(module, weights) if kind == "convolution" else None


def _embedding(module: nn.Module, weights: LoraWeights) -> str | None:
    if getattr(module, "max_norm", None) is not None:
        return "the embedding has max_norm, which changes its weights while it is read"
    if weights.magnitude is not None:
        return "DoRA at an embedding is not mixed"
    if weights.bias is not None:
        return "lora_bias at an embedding is not mixed"
    takes = [p for p in signature(type(module).forward).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    if len(takes) != 2:  # self and the ids
        return f"a {type(module).__name__} makes its ids itself, so they cannot be looked up again"
    return None


def _convolution(module: nn.Module, weights: LoraWeights) -> str | None:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if tuple(weights.A.shape[2:]) != module.kernel_size:
        return f"made for a kernel of {tuple(weights.A.shape[2:])}, the backbone has {module.kernel_size}"
    if weights.B.shape[1] * module.groups != weights.rank:
        return f"rank {weights.rank} and B with {weights.B.shape[1]} columns for {module.groups} groups"
    if set(module.dilation) != {1}:
        return f"the convolution has dilation {module.dilation}, the expert's A has none"
    if weights.magnitude is not None and set(module.kernel_size) != {1}:
        return f"DoRA at a convolution with a kernel of {module.kernel_size} is not mixed"
    return None


def _check_base_weights(name: str, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Weights of the backbone that came with the expert have to be this backbone's."""
    for path, weight in adapter.base_weights.items():
        here = getattr(modules[path], "weight", None)
        if not isinstance(here, torch.Tensor) or not here.dtype.is_floating_point:
            continue
        if here.shape != weight.shape or not torch.equal(weight.to(here.device, here.dtype), here.detach()):
            raise ValueError(
                f"expert {name!r} at {path}: it came with the weight that the module had in training, and this "
                "backbone has another one: use the backbone that it was trained on"
            )


def _article(kind: str) -> str:
    return {"linear": "a linear module", "embedding": "an embedding", "convolution": "a convolution"}[kind]


def check_closing(layers: Mapping[str, MixtureLayer], standing: Mapping[str, Any]) -> None:
    """Raises ValueError for a norm that closes a sub-layer and is mixed by itself too, as PEFT's experts train it."""
    for path in (*layers, *standing):
        outer, _, last = path.rpartition(".")
        if last == "LayerNorm" and outer in layers and isinstance(layers[outer], OutputMixture):
            raise closed_twice(path, outer)
        if path in standing and isinstance(layers.get(path), SplitMixture):
            raise closed_twice(path, path)


def closed_twice(path: str, site: str) -> ValueError:
    """What to raise for the norm at `path`, which is a part of the site `site`."""
    return ValueError(
        f"{path}: experts trained its bias, or the norm as a whole module, and others have branches at "
        f"{site}, each with a norm of its own: leave one of these kinds out"
    )
