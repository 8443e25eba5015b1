"""mole's own folder format, for methods that PEFT has not: `mole_adapter.json` and `adapter_model.safetensors`.

The tensors are named `<path of the module>.<short name>`, those of whole modules of the backbone that were trained
along `<path>.full.<name>`; the rest of what is to be known of a module is in the JSON. Norms that were trained along
are modules of the kind norm; a module without a kind is of the adapter's method.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mole.adapters.adapter import Adapter
from mole.adapters.bottleneck import BottleneckWeights
from mole.adapters.norm import NormWeights
from mole.adapters.peft_patterns import is_plain
from mole.untrusted import Damaged, Refused, safetensors_tensors, shown, strict_json

CONFIG = "mole_adapter.json"
WEIGHTS = "adapter_model.safetensors"
FORMAT = 1
MAX_CONFIG_BYTES = 4 << 20
_WEIGHTS = {"bottleneck": BottleneckWeights}
_KINDS = {**_WEIGHTS, "norm": NormWeights}
_KEYS = {"backbone", "dropout", "format", "method", "modules", "targets", "task_type"}
_FULL = re.compile(r"((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)\.full\.([A-Za-z0-9_.]+)", re.ASCII)


def dump(adapter: Adapter, backbone_name: str | None) -> dict[str, bytes]:
    """The two files, name → bytes; equal adapters give equal bytes. Raises ValueError for what is not here."""
    if adapter.biases or adapter.base_weights:
        raise ValueError(f"an adapter of method {adapter.method!r} has no place for biases of the backbone")
    if adapter.method not in _WEIGHTS:
        raise ValueError(f"there is no format for an adapter of method {adapter.method!r}")
    node = {
        "backbone": backbone_name,
        "dropout": adapter.dropout,
        "format": FORMAT,
        "method": adapter.method,
        "modules": {path: _told(part) for path, part in adapter.modules.items()},
        "targets": list(adapter.targets),
        "task_type": adapter.task_type,
    }
    if adapter.full_modules:
        node["full_names"] = list(adapter.full_names)
    text = json.dumps(node, indent=1, allow_nan=False) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors().items()}
    return {CONFIG: text.encode(), WEIGHTS: save(tensors, metadata={"format": "pt"})}


def _told(part: Any) -> dict[str, Any]:
    """What is to be known of a module beside its tensors."""
    facts = {one.name: getattr(part, one.name) for one in fields(part) if not str(one.type).startswith("Tensor")}
    return {"kind": "norm", **facts} if isinstance(part, NormWeights) else facts


def parse(config: bytes, weights: bytes, where: str) -> tuple[Adapter, str | None]:
    """The adapter in the bytes of the two files, and the name of its backbone. Raises Damaged or Refused."""
    what = f"{where}/{CONFIG}"
    node = strict_json(config, what, max_bytes=MAX_CONFIG_BYTES, max_depth=6)
    if not isinstance(node, dict) or set(node) - {"full_names"} != _KEYS:
        raise Damaged(f"{what}: not an object with {', '.join(sorted(_KEYS))}")
    if node["format"] != FORMAT or node["method"] not in _WEIGHTS:
        raise Refused(
            f"{what}: format {shown(node['format'])}, method {shown(node['method'])} needs another version of mole; "
            f"this one reads format {FORMAT}, {', '.join(_WEIGHTS)}"
        )
    _check(node, what)
    tensors = safetensors_tensors(weights, f"{where}/{WEIGHTS}")
    full = _full_modules(node, tensors, what)
    adapter = Adapter(
        method=node["method"],
        modules=_modules(node, tensors, what),
        dropout=float(node["dropout"]),
        targets=tuple(node["targets"]),
        task_type=node["task_type"],
        full_modules=full,
        full_names=tuple(node.get("full_names", ())),
    )
    return adapter, node["backbone"]


def _check(node: dict[str, Any], what: str) -> None:
    good = {
        "dropout": type(node["dropout"]) in (int, float) and 0 <= node["dropout"] < 1,
        "targets": isinstance(node["targets"], list)
        and all(isinstance(t, str) and is_plain(t) for t in node["targets"]),
        "task_type": node["task_type"] is None or isinstance(node["task_type"], str),
        "backbone": node["backbone"] is None or isinstance(node["backbone"], str),
        "modules": isinstance(node["modules"], dict) and bool(node["modules"]),
    }
    if "full_names" in node:
        names = node["full_names"]
        good["full_names"] = isinstance(names, list) and all(isinstance(n, str) and is_plain(n) for n in names)
    if wrong := [key for key, is_good in good.items() if not is_good]:
        raise Damaged(f"{what}: {wrong[0]} is {shown(node[wrong[0]])}")


def _full_modules(node: dict[str, Any], tensors: dict[str, Tensor], what: str) -> dict[str, dict[str, Tensor]]:
    """Takes the tensors of whole modules out of `tensors`. Raises Refused for those that the config does not name."""
    found: dict[str, dict[str, Tensor]] = {}
    if "full_names" not in node:
        return found
    for name in [name for name in tensors if _FULL.fullmatch(name)]:
        match = _FULL.fullmatch(name)
        assert match is not None
        if not any(part in node["full_names"] for part in match[1].split(".")):
            raise Refused(f"{what}: tensor {shown(name)} is of a module that full_names does not name")
        found.setdefault(match[1], {})[match[2]] = tensors.pop(name)
    return found


def _modules(node: dict[str, Any], tensors: dict[str, Tensor], what: str) -> dict[str, Any]:
    rest, found = dict(tensors), {}
    for path, facts in node["modules"].items():
        name = facts.get("kind", node["method"]) if isinstance(facts, dict) else None
        if not is_plain(path) or name is None or name not in (node["method"], "norm"):
            raise Damaged(f"{what}: modules: {shown(path)} is {shown(facts)}")
        kind = _KINDS[name]
        names = {one.name: "None" in str(one.type) for one in fields(kind) if str(one.type).startswith("Tensor")}
        told = {one.name for one in fields(kind)} - set(names)
        if set(facts) - {"kind"} != told:
            raise Damaged(f"{what}: modules: {shown(path)} needs {', '.join(sorted(told)) or 'nothing but its kind'}")
        parts = {name: rest.pop(f"{path}.{name}", None) for name in names}
        if missing := [name for name, tensor in parts.items() if tensor is None and not names[name]]:
            raise Damaged(f"{what}: {path} has no tensor {missing[0]}")
        found[path] = _made(kind, parts, {n: v for n, v in facts.items() if n != "kind"}, f"{what}: {path}")
    if rest:
        raise Refused(f"{what}: tensor {shown(min(rest))} belongs to no module")
    return found


def _made(kind: Any, parts: dict[str, Any], facts: dict[str, Any], where: str) -> Any:
    scale = facts.get("scale", 1.0)
    if type(scale) not in (int, float) or not 0 < scale <= 1e9:
        raise Damaged(f"{where}: scale is {shown(scale)}")
    if any(not isinstance(value, str) for name, value in facts.items() if name != "scale"):
        raise Damaged(f"{where}: {shown(facts)}")
    if "scale" in facts:
        facts = {**facts, "scale": float(scale)}
    try:
        return kind(**parts, **facts)
    except ValueError as error:
        raise Damaged(f"{where}: {error}") from None
