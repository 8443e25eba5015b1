"""AdapterHub's folders: `adapter_config.json` with `config` and `model_type`, and `adapter.safetensors`.

Bottlenecks (seq_bn, double_seq_bn, par_bn) and LoRA. Before a norm AdapterHub reads h + x in a seq_bn, and the residual
stream in a par_bn; mole's bottlenecks do not, so of those backbones only double_seq_bn is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mole.adapters.adapter import Adapter
from mole.adapters.adapterhub_config import HubConfig, bottleneck_config, checked, dropout, factor_for
from mole.adapters.adapterhub_lora import alpha_of, loras
from mole.adapters.adapterhub_places import Spot, by_home, by_module, is_post_norm, matched, places
from mole.adapters.bottleneck import BottleneckWeights
from mole.adapters.norm import NormWeights
from mole.untrusted import Damaged, Refused, safetensors_tensors, shown, strict_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"
MAX_CONFIG_BYTES = 1 << 20
VERSION = "adapters.1.1.0"

_PATH = r"((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)"
_PART = re.compile(
    rf"{_PATH}\.adapters\.([^.]+)\.(adapter_down\.0\.weight|adapter_down\.0\.bias|adapter_up\.weight|"
    r"adapter_up\.bias|scaling)",
    re.ASCII,
)
_SHORT = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
    "scaling": "gain",
}


@dataclass(frozen=True)
class HubFolder:
    """What such a folder holds: the adapter, its backbone's name as text, its own name, the version that wrote it."""

    adapter: Adapter
    backbone: str | None
    name: str
    version: str | None


@dataclass(frozen=True)
class Target:
    """The backbone that a folder is for: its kind, the features of its hidden states, the number of its blocks."""

    model_type: str
    width: int
    num_layers: int | None = None


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Whether this is the config of such a folder."""
    return "peft_type" not in config and "config" in config and ("model_type" in config or "hidden_size" in config)


def parse(config: bytes, weights: bytes, where: str, *, alpha: float | None = None) -> HubFolder:
    """The adapter in the bytes of the two files; `where` names them in errors.

    `alpha` stands in for the stored scale of a LoRA, which is not trusted in folders of versions before 1.1.0. Raises
    Damaged, and Refused for what mole cannot follow, naming the field.
    """
    what = f"{where}/{CONFIG}"
    node = strict_json(config, what, max_bytes=MAX_CONFIG_BYTES, max_depth=6)
    if not isinstance(node, dict) or not is_adapterhub(node):
        raise Damaged(f"{what}: no config of AdapterHub: it has no config with model_type or hidden_size")
    fields = checked(node["config"], what)
    kind, version = model_type_of(node, what), node.get("version")
    version = version if isinstance(version, str) else None
    tensors = safetensors_tensors(weights, f"{where}/{WEIGHTS}")
    if fields.get("architecture") == "lora":
        modules: dict[str, Any] = dict(loras(fields, tensors, where, alpha_of(fields, version, alpha, what)))
        adapter = Adapter("lora", modules, dropout=dropout(fields, what), fan_in_fan_out=kind == "gpt2")
    else:
        said = bottleneck_config(fields, what)
        adapter = Adapter("bottleneck", dict(_bottlenecks(said, tensors, kind, where)), dropout=said.dropout)
    backbone = node.get("model_name")
    return HubFolder(
        adapter, backbone if isinstance(backbone, str) and backbone else None, str(node.get("name") or ""), version
    )


def model_type_of(node: Mapping[str, Any], what: str) -> str:
    """The kind of the backbone in a config. Raises Refused where there is none."""
    value = node.get("model_type")
    if not isinstance(value, str) or not 0 < len(value) <= 100:
        raise Refused(f"{what}: model_type is {shown(value)}; the kind of the backbone is wanted")
    return value


def _bottlenecks(said: HubConfig, tensors: dict[str, Tensor], kind: str, where: str) -> dict[str, BottleneckWeights]:
    """Path of a module → its bottleneck, in the order of execution."""
    try:
        post_norm = is_post_norm(kind)
    except ValueError as error:
        raise Refused(f"{where}: {error}") from None
    if not post_norm and said.reads != "h":
        field, seen = ("is_parallel", "x") if said.reads == "x" else ("original_ln_before", "h + x")
        raise Refused(
            f"{where}: {field} is True: in a {kind}, where no norm closes a sub-layer, AdapterHub then reads {seen}, "
            "which mole's bottlenecks do not read; only adapters like double_seq_bn (houlsby) are taken for it"
        )
    found: dict[Spot, dict[str, Tensor]] = {}
    for key, tensor, match in matched(tensors, _PART, where):
        spot = by_home(match[1], kind)
        if spot is None:
            raise Refused(f"{where}: tensor {shown(key)} is at no place of a {kind}")
        found.setdefault(spot, {})[_SHORT[match[3]]] = tensor
    _check_places(said, [(spot.layer, spot.part) for spot in found], where)
    reads = said.reads if post_norm else "output"
    ordered = sorted(found, key=lambda spot: spot.order)
    return {spot.module: _bottleneck(said, spot, found[spot], reads, where) for spot in ordered}


def _check_places(said: HubConfig, found: list[tuple[int, str]], where: str) -> None:
    """Every block has what the config says, no other has anything."""
    wanted = [(n, p) for n in range(max(found)[0] + 1) if n not in said.leave_out for p in said.parts]
    flags = {"attention": "mh_adapter", "ffn": "output_adapter"}
    for layer, part in found:
        if layer in said.leave_out:
            raise Refused(f"{where}: tensors in block {layer}, which leave_out names")
        if part not in said.parts:
            raise Refused(f"{where}: tensors at the {part} of block {layer}, and {flags[part]} is False")
    if missing := [row for row in wanted if row not in found]:
        layer, part = missing[0]
        raise Damaged(f"{where}: block {layer} has no tensor for {flags[part]}, and leave_out does not name it")


def _bottleneck(said: HubConfig, spot: Spot, parts: dict[str, Any], reads: str, where: str) -> BottleneckWeights:
    learned = said.scale is None
    if missing := [key for key, short in _SHORT.items() if short not in parts and (short != "gain" or learned)]:
        raise Damaged(f"{where}: {spot.home} has no tensor {missing[0]}")
    if "gain" in parts and not learned:
        raise Refused(f"{where}: {spot.home} has a tensor scaling, and the config's scaling is {said.scale}")
    scale = 1.0 if said.scale is None else said.scale
    try:
        made = BottleneckWeights(**parts, activation=said.activation, scale=scale, reads=reads)
    except ValueError as error:
        raise Damaged(f"{where}: {spot.home}: {error}") from None
    size = said.size(spot.layer, made.up.shape[0])
    if size is not None and size != made.rank:
        raise Damaged(
            f"{where}: {made.rank} features in the weights of {spot.home}, {size} by reduction_factor in its config"
        )
    return made


def holdable(adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter without what the format has no place for, and what that is; whole modules are looked at elsewhere."""
    kept = {path: part for path, part in adapter.modules.items() if not isinstance(part, NormWeights)}
    if len(kept) == len(adapter.modules):
        return adapter, ()
    count = len(adapter.modules) - len(kept)
    return replace(adapter, modules=kept), (f"{count} trained norm{'s' if count > 1 else ''}",)


def dump(adapter: Adapter, name: str, backbone_name: str | None, target: Target) -> dict[str, bytes]:
    """The two files, name → bytes, of bottlenecks for that backbone; whole modules of the adapter are not in them.

    Raises ValueError for what the format, or this table of places, has no place for.
    """
    if adapter.method != "bottleneck":
        raise ValueError(f"format=adapterhub holds bottlenecks, this is a {adapter.method}: use format=peft")
    if lost := holdable(adapter)[1]:
        raise ValueError(f"format=adapterhub has no place for {', '.join(lost)}: allow_partial=true leaves them out")
    try:
        places(target.model_type)
    except ValueError as error:
        raise ValueError(f"format=adapterhub: {error}") from None
    tensors, spots = {}, {}
    for path, part in adapter.modules.items():
        spot = by_module(path, target.model_type)
        if spot is None or part.reads == "input":
            raise ValueError(f"format=adapterhub has no place for the bottleneck at {path}, which reads {part.reads}")
        spots[spot] = part
        for theirs, short in _SHORT.items():
            if (tensor := getattr(part, short)) is not None:
                tensors[f"{spot.home}.adapters.{name}.{theirs}"] = tensor.detach().cpu().contiguous()
    said = replace(_said(spots, target), dropout=adapter.dropout)
    return {CONFIG: config_file(said.fields(), name, backbone_name, target), WEIGHTS: save(tensors)}


def _said(spots: Mapping[Spot, BottleneckWeights], target: Target) -> HubConfig:
    """The config of these bottlenecks. Raises ValueError where they are too unlike for one."""
    kinds = {(part.activation, part.scale, part.gain is not None, part.reads) for part in spots.values()}
    if len(kinds) > 1:
        raise ValueError("format=adapterhub has one activation, scale and input for all bottlenecks of an adapter")
    ((activation, scale, learned, reads),) = kinds
    if learned and scale != 1:
        raise ValueError(f"format=adapterhub has no place for a factor {scale} beside the learned scale")
    sizes = {layer: {part.rank for spot, part in spots.items() if spot.layer == layer} for layer, *_ in _orders(spots)}
    parts = {layer: {spot.part for spot in spots if spot.layer == layer} for layer in sizes}
    if any(len(found) > 1 for found in sizes.values()):
        raise ValueError("format=adapterhub has one size for both bottlenecks of a block")
    if len({frozenset(found) for found in parts.values()}) > 1:
        raise ValueError("format=adapterhub has bottlenecks at the same sub-layers of every block, or at none of one")
    count = target.num_layers or max(sizes) + 1
    if max(sizes) >= count:
        raise ValueError(f"num_layers={count}, and a bottleneck is in block {max(sizes)}")
    return HubConfig(
        reads="h" if reads == "output" else reads,
        parts=tuple(sorted(parts[min(parts)])),
        activation=activation,
        scale=None if learned else scale,
        factor=factor_for({layer: min(found) for layer, found in sizes.items()}, target.width),
        leave_out=tuple(layer for layer in range(count) if layer not in sizes),
    )


def _orders(spots: Mapping[Spot, Any]) -> list[tuple[int, int]]:
    return sorted(spot.order for spot in spots)


def config_file(
    config: Any, name: str, backbone_name: str | None, target: Target, model_class: str | None = None
) -> bytes:
    """A config of AdapterHub with what it says of the backbone."""
    node = {
        "config": config,
        "hidden_size": target.width,
        **({} if model_class is None else {"model_class": model_class}),
        "model_name": backbone_name,
        "model_type": target.model_type,
        "name": name,
        "version": VERSION,
    }
    return (json.dumps(node, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
