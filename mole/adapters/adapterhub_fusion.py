"""AdapterHub's fusion: `adapter_fusion_config.json` and `model_adapter_fusion.safetensors`, as weights of a router.

At each place `adapter_fusion_layer.<a,b>.{query,key,value}`, shared by all adapters there. The key's bias b_k is left
out: it adds the same q · b_k to the scores of all adapters. It is no expert, and belongs to a router over its adapters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mole.adapters.adapterhub_format import MAX_CONFIG_BYTES, model_type_of
from mole.adapters.adapterhub_places import by_home, places
from mole.untrusted import (
    MAX_WEIGHTS_BYTES,
    Damaged,
    LibraryError,
    Refused,
    read_file,
    safetensors_tensors,
    shown,
    strict_json,
)

CONFIG = "adapter_fusion_config.json"
WEIGHTS = "model_adapter_fusion.safetensors"
_NAMED: dict[str, dict[str, Any]] = {"static": {"value": False}, "dynamic": {"value": True}}
# What a field has to be; those without effect on what is computed, once trained.
_FIXED = {
    "key": (True, None),
    "query": (True, None),
    "query_before_ln": (False, None),
    "residual_before": (False, None),
    "temperature": (False, None),
}
_WITHOUT_EFFECT = {"regularization", "value_before_softmax", "value_initialized", "dropout_prob", "value"}
_REASONS = {
    "query_before_ln": "it asks with another value than mole's attention does",
    "residual_before": "it adds the residual to each adapter's share",
    "temperature": "its temperature falls with every forward",
}
_TENSOR = re.compile(
    r"((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)\.adapter_fusion_layer\.([^.]+)\.(query|key|value)\.(weight|bias)", re.ASCII
)
_NAMES = {
    ("query", "weight"): "queries.weight",
    ("query", "bias"): "queries.bias",
    ("key", "weight"): "keys",
    ("value", "weight"): "values",
}


@dataclass(frozen=True)
class Fusion:
    """What such a folder holds: the adapters it is over, path of a module → name of a router's parameter → tensor.

    `value` whether it maps the mix: then each place has `values`, beside `queries.weight`, `queries.bias` and `keys`.
    """

    names: tuple[str, ...]
    value: bool
    sites: dict[str, dict[str, Tensor]]


def read_fusion(folder: str | Path) -> Fusion:
    """The fusion in a folder. Raises LibraryError where there is none, Damaged, Refused."""
    folder = Path(folder).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise LibraryError(f"no fusion of AdapterHub's in {folder}: it has no {name}")
    config = read_file(folder / CONFIG, MAX_CONFIG_BYTES)
    return parse(config, read_file(folder / WEIGHTS, MAX_WEIGHTS_BYTES), str(folder))


def parse(config: bytes, weights: bytes, where: str) -> Fusion:
    """The fusion in the bytes of the two files; `where` names them in errors. Raises Damaged or Refused."""
    what = f"{where}/{CONFIG}"
    node = strict_json(config, what, max_bytes=MAX_CONFIG_BYTES, max_depth=6)
    if not isinstance(node, dict) or "config" not in node:
        raise Damaged(f"{what}: no config of a fusion")
    value, model_type = _maps_values(node["config"], what), model_type_of(node, what)
    try:
        places(model_type)
    except ValueError as error:
        raise Refused(f"{what}: {error}") from None
    tensors = safetensors_tensors(weights, f"{where}/{WEIGHTS}", also=",")
    found: dict[str, dict[str, Tensor]] = {}
    names: set[str] = set()
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        spot = match and by_home(match[1], model_type)
        if match is None or spot is None:
            raise Refused(f"{where}: tensor {shown(key)} is of no fusion at a place of a {model_type}")
        names.add(match[2])
        if (name := _NAMES.get((match[3], match[4]))) is not None:
            found.setdefault(spot.module, {})[name] = tensor
        elif match[3] == "value":
            raise Refused(f"{where}: tensor {shown(key)}: the map of the mix has no bias")
    if len(names) != 1:
        raise Refused(f"{where}: {len(names)} fusions ({', '.join(sorted(names)[:4])}); the folder of one is wanted")
    _check(found, value, where)
    return Fusion(tuple(names.pop().split(",")), value, found)


def _maps_values(given: Any, what: str) -> bool:
    """Whether the mix is mapped. Raises Damaged, and Refused for a field that changes what is computed."""
    if isinstance(given, str):
        if given not in _NAMED:
            raise Refused(f"{what}: config {shown(given)}: known: {', '.join(_NAMED)}")
        given = _NAMED[given]
    if not isinstance(given, dict):
        raise Damaged(f"{what}: config is {shown(given)}")
    for key, value in given.items():
        if key in _FIXED:
            if not any(value is good for good in _FIXED[key]):
                reason = _REASONS.get(key, "the scores are other ones than (W_q z + b_q) · W_k u")
                raise Refused(f"{what}: {key} is {shown(value)}: {reason}")
        elif key not in _WITHOUT_EFFECT and value not in (None, False, 0, "", [], {}):
            raise Refused(f"{what}: {key} is set to {shown(value)}: mole does not know how to follow it")
    value = given.get("value", True)
    if type(value) is not bool:
        raise Refused(f"{what}: value is {shown(value)}; true or false is wanted")
    return value


def _check(found: Mapping[str, Mapping[str, Tensor]], value: bool, where: str) -> None:
    wanted = {name for name in _NAMES.values() if value or name != "values"}
    for path, parts in found.items():
        if set(parts) != wanted:
            odd = min(set(parts) ^ wanted)
            raise Damaged(f"{where}: the fusion at {path} {'lacks' if odd in wanted else 'has'} {odd}")
        width = len(parts["queries.bias"])
        if any(tuple(t.shape) != ((width,) if name == "queries.bias" else (width,) * 2) for name, t in parts.items()):
            shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
            raise Damaged(f"{where}: the fusion at {path} has tensors of shapes {shapes}")
