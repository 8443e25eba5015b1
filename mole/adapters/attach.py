"""Put an adapter on a backbone, read its weights from there, take it off again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mole.adapters.adapter import Adapter, AdapterLayer
from mole.adapters.bottleneck import OutputLayer, SplitLayer
from mole.adapters.norm import NormLayer
from mole.adapters.places import placed, symbolic
from mole.backbones.modules import ALL_LINEAR, replace_module
from mole.registry import ADAPTERS, unknown


def layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter's layers on `model`, path in the plain backbone → layer, in the order of `named_modules()`."""
    found: dict[str, AdapterLayer] = {}
    outer = ""
    for path, module in model.named_modules():
        if not isinstance(module, AdapterLayer):
            continue
        if outer and f"{path}.".startswith(f"{outer}.base."):  # a norm inside an output module, or with a bottleneck
            found[f"{outer}{path.removeprefix(f'{outer}.base')}"] = module
        else:
            outer = path
            found[module.split.path if isinstance(module, SplitLayer) else path] = module
    return found


def attach(model: nn.Module, config: Any, *, seed: int, trained: Iterable[str] = ()) -> dict[str, AdapterLayer]:
    """Wrap the modules that the method `config.name` has its places at in new layers of it.

    All else is frozen but for the modules at the paths `trained`, such as a head. The first weights of a module depend
    on `seed` and on the module's path, on nothing else. Raises ValueError if a target finds no module, or one that the
    method cannot adapt, or if the model has an adapter already.
    """
    _refuse_second(model)
    made, trained = {}, tuple(trained)
    for path, make in ADAPTERS[config.name].implementation(config, model).items():
        if whole := next((head for head in trained if path == head or path.startswith(f"{head}.")), None):
            if getattr(config, "targets", None) == ALL_LINEAR:
                continue
            raise ValueError(f"{path} is a part of {whole}, which is trained whole: leave it out of adapter.targets")
        digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        made[path] = _named(path, make, generator)
    found = _put(model, made)
    for path in trained:
        model.get_submodule(path).requires_grad_(True)
    return found


def attach_weights(model: nn.Module, adapter: Adapter, *, trained: Iterable[str] = ()) -> dict[str, AdapterLayer]:
    """Put a given adapter's weights on `model` (copied, as float32); all else is frozen, but for `trained` paths.

    Whole modules that it has, such as a head, are copied into those of the model, which are trainable then. Raises
    ValueError if the model lacks a module of the adapter, or has it in another shape: then the adapter was made for
    another backbone. So it does for a LoRA at other modules than linear ones, and for one with biases.
    """
    _refuse_second(model)
    adapter = placed(model, adapter)
    if adapter.biases:
        raise ValueError(
            f"the adapter holds biases of the backbone itself ({', '.join([*adapter.biases][:4])}): it works in a "
            "mixture; it cannot be trained further by itself"
        )
    modules = dict(model.named_modules())
    whole = {path: _fitting(path, parts, modules) for path, parts in adapter.full_modules.items()}
    for path in adapter.modules:
        if path not in modules:
            raise ValueError(f"the adapter is for another backbone: {unknown('module', path, _alike(path, modules))}")
    made = {
        path: _named(path, weights.layer, modules[path], adapter.dropout, model)
        for path, weights in adapter.modules.items()
    }
    found = _put(model, made)
    for path in trained:
        model.get_submodule(path).requires_grad_(True)
    for path, module in whole.items():
        module.requires_grad_(True)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(adapter.full_modules[path][name])
    return found


def extract(model: nn.Module, full: Iterable[str] = ()) -> Adapter:
    """The adapter that is on `model`, its weights copied to the CPU. Raises ValueError if there is none.

    Weights that have a place in any backbone are under the symbol of it. The modules at the paths `full` go with it
    whole, as its `full_modules`.
    """
    found = layers(model)
    if not found:
        raise ValueError("the model has no adapter")
    transposed = {isinstance(layer.base, Conv1D) for layer in found.values()}
    adapter = Adapter(
        method=_method(found),
        modules={path: layer.weights() for path, layer in found.items()},
        dropout=max(layer.dropout.p for layer in found.values()),
        fan_in_fan_out=transposed == {True},
    )
    if full := tuple(full):
        whole = {path: dict(model.get_submodule(path).named_parameters()) for path in full}
        adapter = replace(
            adapter,
            task_type="SEQ_CLS",
            full_modules={p: {n: t.detach().cpu().clone() for n, t in parts.items()} for p, parts in whole.items()},
            full_names=tuple(dict.fromkeys(path.rpartition(".")[2] for path in full)),
        )
    named = symbolic(adapter)
    return replace(named, targets=_short_targets(model, found) if list(named.modules) == list(found) else ())


def detach(model: nn.Module) -> Adapter:
    """Take the adapter off: the wrapped modules stand in their places again, the same objects. Returns the adapter."""
    adapter = extract(model)
    for path, layer in layers(model).items():  # what is inside another one after it
        if isinstance(layer, SplitLayer):
            layer.part()
            path = str(layer.split.norm)
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
    """Raises ValueError for a module inside another one, but for the norm of an output module."""
    for path, layer in made.items():
        outer = next((other for other in made if path.startswith(f"{other}.")), None)
        if outer and not (isinstance(layer, NormLayer) and isinstance(made[outer], OutputLayer)):
            raise ValueError(f"{path} is a part of {outer}, which is adapted too: choose one of them")
    model.requires_grad_(False)
    splits = {str(layer.split.norm): layer for layer in made.values() if isinstance(layer, SplitLayer)}
    for path, layer in splits.items():
        replace_module(model, path, layer)
    rest = {path: layer for path, layer in made.items() if not isinstance(layer, SplitLayer)}
    for path, layer in sorted(rest.items(), key=lambda row: -row[0].count(".")):  # parts before the whole
        replace_module(model, f"{path}.base" if path in splits else path, layer)
    for layer in splits.values():
        layer.join(model)
    return made


def _fitting(path: str, parts: dict[str, Tensor], modules: dict[str, nn.Module]) -> nn.Module:
    """The module that whole tensors go into. Raises ValueError if there is none of these shapes."""
    if path not in modules:
        raise ValueError(
            f"the adapter has a trained {path}, which the backbone lacks: it is for a backbone with that head, as "
            "classification data gives it"
        )
    here = {name: tuple(p.shape) for name, p in modules[path].named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    if here != given:
        raise ValueError(f"{path}: the adapter's head has {given}, the backbone's {here}: are the labels the same?")
    return modules[path]


def _alike(path: str, modules: dict[str, nn.Module]) -> list[str]:
    """A few modules to name in an error: those with the same last part, else the first with weights of their own."""
    last = path.rsplit(".", 1)[-1]
    same = [known for known in modules if known.rsplit(".", 1)[-1] == last]
    leaves = [known for known, module in modules.items() if next(module.parameters(recurse=False), None) is not None]
    return (same or leaves)[:8]


def _short_targets(model: nn.Module, found: dict[str, AdapterLayer]) -> tuple[str, ...]:
    """The shortest ends of paths that find exactly the adapted modules; else their whole paths."""
    if any(isinstance(layer, NormLayer) for layer in found.values()):
        return ()
    inside = tuple(f"{path}." for path in found)
    paths = [path for path, _ in model.named_modules() if path and not path.startswith(inside)]
    for parts in (1, 2, 3):
        ends = {".".join(path.split(".")[-parts:]) for path in found}
        if {path for path in paths if any(path == end or path.endswith(f".{end}") for end in ends)} == set(found):
            return tuple(sorted(ends))
    return tuple(sorted(found))
