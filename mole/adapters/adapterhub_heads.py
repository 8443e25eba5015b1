"""AdapterHub's heads: `head_config.json` and `model_head.safetensors`, as whole modules of the backbone and back.

A head of its model classes is a row of linear maps `heads.<name>.<place>` that reads the first token, or the pooler's
output. Of one or two maps it is the head that transformers' own class has. Tensors that bear that class's names already
(`classifier.…`) are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mole.adapters.adapterhub_format import MAX_CONFIG_BYTES, Target, config_file, model_type_of
from mole.untrusted import Damaged, Refused, safetensors_tensors, shown, strict_json

CONFIG = "head_config.json"
WEIGHTS = "model_head.safetensors"
Modules = dict[str, dict[str, Tensor]]

_OWN = re.compile(r"(classifier|score|qa_outputs|pooler)\.((?:[A-Za-z0-9_]+\.)*(?:weight|bias))", re.ASCII)
_FLEXIBLE = re.compile(r"heads\.([^.]+)\.(\d+)\.(weight|bias)", re.ASCII)


@dataclass(frozen=True)
class _Shape:
    """One head: `maps` (path of a whole module, what is in front of weight and bias) from input to output.

    One that reads the backbone's `pooler` is read and not written: its tensors do not say that it does.
    """

    maps: tuple[tuple[str, str], ...]
    activation: str | None
    pooler: bool

    @property
    def fields(self) -> dict[str, Any]:
        return {"layers": len(self.maps), "use_pooler": self.pooler, "activation_function": self.activation}


_TWO = (("classifier", "dense."), ("classifier", "out_proj."))
_SHAPES: dict[str, tuple[_Shape, ...]] = {
    "bert": (
        _Shape((("classifier", ""),), None, True),
        _Shape((("bert.pooler", "dense."), ("classifier", "")), "tanh", False),
    ),
    "electra": (_Shape(_TWO, "gelu", False),),
    **dict.fromkeys(("roberta", "xlm-roberta"), (_Shape(_TWO, "tanh", False),)),
}
_CLASSES = {"bert": "Bert", "electra": "Electra", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}


@dataclass(frozen=True)
class HubHead:
    """A head: whole modules, and its labels in the order of its outputs (none: it gives a number); None: not said."""

    modules: Modules
    labels: tuple[str, ...] | None


def parse(config: bytes, weights: bytes, where: str) -> HubHead:
    """The head in the bytes of the two files; `where` names them in errors. Raises Damaged or Refused."""
    what = f"{where}/{CONFIG}"
    node = strict_json(config, what, max_bytes=MAX_CONFIG_BYTES, max_depth=6)
    if not isinstance(node, dict) or not isinstance(node.get("config", {}), dict | None):
        raise Damaged(f"{what}: no config of a head")
    fields, tensors = node.get("config") or {}, safetensors_tensors(weights, f"{where}/{WEIGHTS}")
    if any(name.startswith("heads.") for name in tensors):
        modules = _flexible(fields, tensors, model_type_of(node, what), where)
    else:
        modules = _own(tensors, where)
    return HubHead(modules, _labels(fields, what))


def _own(tensors: Mapping[str, Tensor], where: str) -> Modules:
    found: Modules = {}
    for name, tensor in tensors.items():
        match = _OWN.fullmatch(name)
        if match is None:
            raise Refused(
                f"{where}/{WEIGHTS}: tensor {shown(name)} is of a head that the backbone's own class has not; only "
                "classifier, score, qa_outputs and pooler are taken"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    return found


def _flexible(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], model_type: str, where: str) -> Modules:
    if fields.get("head_type") != "classification":
        raise Refused(f"{where}/{CONFIG}: head_type is {shown(fields.get('head_type'))}; classification is taken")
    said = {key: fields.get(key) for key in ("layers", "use_pooler", "activation_function")}
    said["use_pooler"] = bool(said["use_pooler"])
    if said["layers"] == 1:
        said["activation_function"] = None  # it stands between two maps
    shape = next((one for one in _SHAPES.get(model_type, ()) if one.fields == said), None)
    if shape is None:
        told = ", ".join(f"{key} {shown(value)}" for key, value in said.items())
        known = "; ".join(str(one.fields) for one in _SHAPES.get(model_type, ())) or "none"
        raise Refused(f"{where}/{CONFIG}: a head with {told}: that of a {model_type} has another form (known: {known})")
    rows: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FLEXIBLE.fullmatch(name)
        if match is None:
            raise Refused(f"{where}/{WEIGHTS}: tensor {shown(name)} is of no linear map of a head")
        rows.setdefault(int(match[2]), {})[match[3]] = tensor
    maps = [rows[place] for place in sorted(rows)]
    if len(maps) != len(shape.maps) or any(set(one) != {"weight", "bias"} for one in maps):
        raise Damaged(f"{where}/{WEIGHTS}: wanted are weight and bias of {len(shape.maps)} maps of one head")
    found: Modules = {}
    for (path, prefix), one in zip(shape.maps, maps, strict=True):
        found.setdefault(path, {}).update({f"{prefix}{name}": tensor for name, tensor in one.items()})
    return found


def _labels(fields: Mapping[str, Any], what: str) -> tuple[str, ...] | None:
    count, given = fields.get("num_labels"), fields.get("label2id")
    if count == 1:
        return ()
    if not given:
        return None
    if not isinstance(given, dict) or sorted(map(repr, given.values())) != sorted(map(repr, range(len(given)))):
        raise Damaged(f"{what}: label2id is {shown(given)}")
    if count not in (None, len(given)):
        raise Damaged(f"{what}: num_labels is {shown(count)}, label2id has {len(given)}")
    return tuple(sorted(given, key=given.__getitem__))


def has_place(modules: Modules, model_type: str) -> tuple[Modules, tuple[str, ...]]:
    """Those whole modules that make a head of AdapterHub's, and the paths of the others."""
    shape = _written(modules, model_type, exactly=False)
    kept = {} if shape is None else {path: modules[path] for path in dict(shape.maps)}
    return kept, tuple(path for path in modules if path not in kept)


def _written(modules: Modules, model_type: str, *, exactly: bool = True) -> _Shape | None:
    """The head that these modules are, or with others beside it."""
    given = {f"{path}.{name}" for path, parts in modules.items() for name in parts}
    for one in _SHAPES.get(model_type, ()):
        wanted = {f"{path}.{prefix}{name}" for path, prefix in one.maps for name in ("weight", "bias")}
        if not one.pooler and (wanted == given if exactly else wanted <= given):
            return one
    return None


def dump(
    modules: Modules, name: str, backbone_name: str | None, target: Target, labels: tuple[str, ...] | None
) -> dict[str, bytes]:
    """The two files of a head, name → bytes. Raises ValueError for whole modules that are none of AdapterHub's."""
    shape = _written(modules, target.model_type)
    if shape is None:
        raise ValueError(f"format=adapterhub has no head for a {target.model_type} with {', '.join(modules)}")
    tensors = {}
    for place, (path, prefix) in enumerate(shape.maps):
        for part in ("weight", "bias"):  # dropout, map, activation; dropout, map
            tensor = modules[path][f"{prefix}{part}"].detach().cpu().contiguous()
            tensors[f"heads.{name}.{1 + 3 * place}.{part}"] = tensor
    last, prefix = shape.maps[-1]
    config = {
        "activation_function": shape.activation,
        "bias": True,
        "dropout_prob": None,
        "head_type": "classification",
        "label2id": {label: index for index, label in enumerate(labels)} if labels else None,
        "layers": len(shape.maps),
        "num_labels": len(modules[last][f"{prefix}weight"]),
        "use_pooler": shape.pooler,
    }
    model_class = f"{_CLASSES[target.model_type]}AdapterModel"
    return {CONFIG: config_file(config, name, backbone_name, target, model_class), WEIGHTS: save(tensors)}
