"""Put an adapter on a backbone, read its weights from there, take it off again."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mole.adapters.adapter import Adapter, AdapterLayer
from mole.adapters.places import placed, symbolic
from mole.backbones.modules import replace_module
from mole.registry import ADAPTERS, unknown


def layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter's layers on `model`, path → layer, in the order of `named_modules()`."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLayer)}


def attach(model: nn.Module, config: Any, *, seed: int) -> dict[str, AdapterLayer]:
    """Wrap the modules that the method `config.name` has its places at in new layers of it; all else is frozen.

    The first weights of a module depend on `seed` and on the module's path, on nothing else. Raises ValueError if a
    target finds no module, or one that the method cannot adapt, or if the model has an adapter already.
    """
    _refuse_second(model)
    made = {}
    for path, make in ADAPTERS[config.name].implementation(config, model).items():
        digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        made[path] = _named(path, make, generator)
    return _put(model, made)


def attach_weights(model: nn.Module, adapter: Adapter) -> dict[str, AdapterLayer]:
    """Put a given adapter's weights on `model` (copied, as float32); all else is frozen.

    Raises ValueError if the model lacks a module of the adapter, or has it in another shape: then the adapter was made
    for another backbone. So it does for a LoRA at other modules than linear ones, and for one with biases.
    """
    _refuse_second(model)
    adapter = placed(model, adapter)
    if adapter.biases or adapter.full_modules:
        held = [*adapter.biases, *adapter.full_modules]
        raise ValueError(
            f"the adapter holds weights of the backbone itself ({', '.join(held[:4])}): it works in a mixture; "
            "it cannot be trained further by itself"
        )
    modules = dict(model.named_modules())
    for path in adapter.modules:
        if path not in modules:
            raise ValueError(f"the adapter is for another backbone: {unknown('module', path, _alike(path, modules))}")
    made = {
        path: _named(path, weights.layer, modules[path], adapter.dropout, model)
        for path, weights in adapter.modules.items()
    }
    return _put(model, made)


def extract(model: nn.Module) -> Adapter:
    """The adapter that is on `model`, its weights copied to the CPU. Raises ValueError if there is none.

    Weights that have a place in any backbone are under the symbol of it.
    """
    found = layers(model)
    if not found:
        raise ValueError("the model has no adapter")
    transposed = {isinstance(layer.base, Conv1D) for layer in found.values()}
    adapter = Adapter(
        method=_method(found),
        modules={path: layer.weights() for path, layer in found.items()},
        dropout=next(iter(found.values())).dropout.p,
        fan_in_fan_out=transposed == {True},
    )
    named = symbolic(adapter)
    return replace(named, targets=_short_targets(model, found) if list(named.modules) == list(found) else ())


def detach(model: nn.Module) -> Adapter:
    """Take the adapter off: the wrapped modules stand in their places again, the same objects. Returns the adapter."""
    adapter = extract(model)
    for path, layer in layers(model).items():
        replace_module(model, path, layer.base)
    return adapter


def _method(found: dict[str, AdapterLayer]) -> str:
    (name,) = {layer.method for layer in found.values()}
    return name


def _refuse_second(model: nn.Module) -> None:
    there = layers(model)
    if there:
        raise ValueError(
            f"the model has an adapter already, on {len(there)} modules ({next(iter(there))} …): detach it"
        )


def _named(path: str, build: Any, *args: Any) -> AdapterLayer:
    """`build(*args)`, with the path in front of its errors."""
    try:
        return build(*args)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _put(model: nn.Module, made: dict[str, AdapterLayer]) -> dict[str, AdapterLayer]:
    """Raises ValueError for a module inside another one."""
    for path in made:
        if outer := next((other for other in made if path.startswith(f"{other}.")), None):
            raise ValueError(f"{path} is a part of {outer}, which is adapted too: choose one of them")
    model.requires_grad_(False)
    for path, layer in made.items():
        layer.base.requires_grad_(False)
        replace_module(model, path, layer)
    return made


def _alike(path: str, modules: dict[str, nn.Module]) -> list[str]:
    """A few modules to name in an error: those with the same last part, else the first with weights of their own."""
    last = path.rsplit(".", 1)[-1]
    same = [known for known in modules if known.rsplit(".", 1)[-1] == last]
    leaves = [known for known, module in modules.items() if next(module.parameters(recurse=False), None) is not None]
    return (same or leaves)[:8]


def _short_targets(model: nn.Module, found: dict[str, AdapterLayer]) -> tuple[str, ...]:
    """The shortest ends of paths that find exactly the adapted modules; else their whole paths."""
    inside = tuple(f"{path}." for path in found)
    paths = [path for path, _ in model.named_modules() if path and not path.startswith(inside)]
    for parts in (1, 2, 3):
        ends = {".".join(path.split(".")[-parts:]) for path in found}
        if {path for path in paths if any(path == end or path.endswith(f".{end}") for end in ends)} == set(found):
            return tuple(sorted(ends))
    return tuple(sorted(found))
