"""PEFT's folder format, the only file that knows its names: `adapter_config.json` and `adapter_model.safetensors`.

Which modules are adapted, and with which rank, is read from the tensors: a pattern in the config is never run.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mole.adapters.adapter import Adapter
from mole.adapters.lora import LoraWeights
from mole.adapters.peft_patterns import PatternTable, is_plain
from mole.untrusted import (
    MAX_WEIGHTS_BYTES,
    Damaged,
    Refused,
    read_file,
    refuse_pickles,
    safetensors_tensors,
    shown,
    strict_json,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 4096
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

_PREFIX = "base_model.model."
_FACTOR = re.compile(rf"{re.escape(_PREFIX)}((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)\.lora_(A|B)\.weight", re.ASCII)
# Starts of A that leave the backbone as it is. PiSSA, OLoRA, CorDA, LoftQ … also change the backbone's own weights.
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# Keys that say nothing about what the trained adapter computes, whatever their value.
_WITHOUT_EFFECT = {
    *("auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config"),
}
_UNREMARKABLE = {
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
}  # always set; not worth a notice

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeftFolder:
    """What a PEFT folder holds: the adapter, the backbone's name as text, and notices about dropped settings."""

    adapter: Adapter
    backbone: str | None
    notices: tuple[str, ...] = field(default=())


def read(folder: str | Path) -> Adapter:
    """The adapter in a PEFT folder. Notices are logged. Raises as `read_folder` does."""
    found = read_folder(folder)
    for notice in found.notices:
        logger.info("%s: %s", folder, notice)
    return found.adapter


def read_folder(folder: str | Path) -> PeftFolder:
    """A PEFT LoRA folder, each file read once.

    Raises ValueError if it is no PEFT folder, Damaged if a file is not what it should be, and Refused if it holds
    pickles or asks for what mole cannot do.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"no adapter in {folder}: it has no {CONFIG}")
    refuse_pickles([entry.name for entry in folder.iterdir()], str(folder))
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"no weights in {folder}: it has no {WEIGHTS}")
    config = read_file(folder / CONFIG, MAX_CONFIG_BYTES)
    return parse(config, read_file(folder / WEIGHTS, MAX_WEIGHTS_BYTES), str(folder))


def parse(config: bytes, weights: bytes, where: str) -> PeftFolder:
    """The adapter in the bytes of the two files; `where` names them in errors. Raises Damaged or Refused."""
    settings, notices = _settings(config, f"{where}/{CONFIG}")
    factors = _factors(safetensors_tensors(weights, f"{where}/{WEIGHTS}"), f"{where}/{WEIGHTS}")
    ranks = _patterns(settings, "rank_pattern", _rank, where)
    alphas = _patterns(settings, "alpha_pattern", _alpha, where)
    if alphas.unreadable:
        raise Refused(f"{where}/{CONFIG}: alpha_pattern has {shown(alphas.unreadable[0])}; only plain names are read")
    modules = {}
    for path, (A, B) in factors.items():
        rank = settings["r"] if (found := ranks.find(path)) is None else found
        if A.shape[0] != rank and not ranks.unreadable:
            raise Damaged(f"{where}: rank {A.shape[0]} in the weights of {path}, {rank} in {CONFIG}")
        alpha = settings["lora_alpha"] if (found := alphas.find(path)) is None else found
        modules[path] = LoraWeights(A=A, B=B, alpha=float(alpha), rslora=settings["use_rslora"])
    adapter = Adapter(
        method="lora",
        modules=modules,
        dropout=float(settings["lora_dropout"]),
        targets=_plain_targets(settings, list(modules)),
        fan_in_fan_out=settings["fan_in_fan_out"],
    )
    return PeftFolder(adapter, settings["base_model_name_or_path"], tuple(notices))


def write(adapter: Adapter, folder: str | Path, backbone_name: str | None) -> None:
    """Write the two files into `folder`, which must exist. Arguments and errors are those of `dump`."""
    for name, data in dump(adapter, backbone_name).items():
        (Path(folder) / name).write_bytes(data)


def dump(adapter: Adapter, backbone_name: str | None) -> dict[str, bytes]:
    """The two files, name → bytes; equal adapters give equal bytes.

    `backbone_name` is noted in the config as the model that the adapter is for. Raises ValueError for a method that
    PEFT does not know.
    """
    if adapter.method != "lora":
        raise ValueError(f"PEFT has no place for an adapter of method {adapter.method!r}")
    tensors = {}
    for path, weights in adapter.modules.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = weights.A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = weights.B.detach().cpu().contiguous()
    text = json.dumps(_config(adapter, backbone_name), indent=2, allow_nan=False) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: save(tensors, metadata={"format": "pt"})}


def _config(adapter: Adapter, backbone_name: str | None) -> dict[str, Any]:
    """What `adapter_config.json` says; the commonest rank and alpha are the rule, the others exceptions."""
    parts = adapter.modules
    rslora = all(part.rslora for part in parts.values())
    ranks = {path: part.rank for path, part in parts.items()}
    alphas = {path: part.alpha if part.rslora == rslora else part.scale * part.rank for path, part in parts.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "alpha_pattern": _exceptions(alphas, alpha),
        "base_model_name_or_path": backbone_name,
        "bias": "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _exceptions(ranks, rank),
        "target_modules": list(adapter.targets or sorted(parts)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": rslora,
    }


def _commonest(values: dict[str, Any]) -> Any:
    counts = Counter(values.values())
    return min(counts, key=lambda value: (-counts[value], value))


def _exceptions(values: dict[str, Any], rule: Any) -> dict[str, Any]:
    """Whole paths; PEFT takes the first that a module's path ends with, so that the longest has to come first."""
    rare = {path for path, value in values.items() if value != rule}
    ends = {path for path in values if any(path.endswith(f".{other}") for other in rare)} - rare
    return {path: values[path] for path in sorted(rare | ends, key=lambda path: (-len(path), path))}


def _factors(tensors: dict[str, Tensor], what: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path → (A, B); nothing else may be there, and neither factor may be missing."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if not match:
            raise Refused(f"{what}: tensor {shown(name)} belongs to no LoRA factor of a linear module")
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise Damaged(f"{what}: no tensor in it")
    for path, pair in found.items():
        for factor in "AB":
            if factor not in pair:
                raise Damaged(f"{what}: {path} has no factor {factor}")
        shapes = tuple(pair["A"].shape), tuple(pair["B"].shape)
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise Damaged(f"{what}: {path} has factors of shapes {shapes[0]} and {shapes[1]}; wanted (r, in), (out, r)")
        if shapes[0][0] > MAX_RANK:
            raise Refused(f"{what}: {path} has rank {shapes[0][0]:,}; at most {MAX_RANK:,} is taken")
    return {path: (pair["A"], pair["B"]) for path, pair in found.items()}


def _plain_targets(settings: dict[str, Any], paths: list[str]) -> tuple[str, ...]:
    """The config's target names, if they find each adapted module and nothing narrows them further; else ()."""
    targets = settings["target_modules"]
    narrowed = settings["exclude_modules"] or settings["layers_to_transform"] is not None
    if narrowed or not isinstance(targets, list) or not all(is_plain(target) for target in targets):
        return ()
    used = {target for target in targets for path in paths if path == target or path.endswith(f".{target}")}
    covered = all(any(path == t or path.endswith(f".{t}") for t in used) for path in paths)
    return tuple(sorted(used)) if covered and used == set(targets) else ()


def _patterns(settings: dict[str, Any], key: str, check: Callable[[Any], str | None], where: str) -> PatternTable:
    given = settings[key] or {}
    if not isinstance(given, dict):
        raise Refused(f"{where}/{CONFIG}: {key} is not an object")
    for name, value in given.items():
        if problem := check(value):
            raise Refused(f"{where}/{CONFIG}: {key}[{shown(name)}] {problem}, got {shown(value)}")
    return PatternTable(given)


def _settings(config: bytes, what: str) -> tuple[dict[str, Any], list[str]]:
    """The checked settings of a config, missing ones filled in, and notices about what is dropped."""
    given = strict_json(config, what, max_bytes=MAX_CONFIG_BYTES, max_depth=6)
    if not isinstance(given, dict):
        raise Damaged(f"{what}: not an object")
    if given.get("peft_type") != "LORA":
        raise Refused(f"{what}: peft_type is {shown(given.get('peft_type'))}; known: LORA")
    settings = {**_DEFAULTS, **given}
    for key, check in _CHECKS.items():
        if problem := check(settings[key]):
            raise Refused(f"{what}: {key} {problem}, got {shown(settings[key])}")
    notices = []
    for key in sorted(set(given) - set(_CHECKS) - {"peft_type", "rank_pattern", "alpha_pattern"}):
        if key in _WITHOUT_EFFECT:
            if given[key] and key not in _UNREMARKABLE:
                notices.append(f"{key} is dropped: the tensors tell which modules are adapted; it cannot change them")
        elif given[key] not in (None, False, 0, "", [], {}):
            raise Refused(f"{what}: {key} is set to {shown(given[key])}, which mole does not know how to follow")
    return settings, notices


def _rank(value: Any) -> str | None:
    return None if type(value) is int and 1 <= value <= MAX_RANK else f"must be a whole number from 1 to {MAX_RANK}"


def _alpha(value: Any) -> str | None:
    good = type(value) in (int, float) and math.isfinite(value) and 0 < value <= 1e9
    return None if good else "must be a number above 0, at most 1e9"


def _dropout(value: Any) -> str | None:
    return None if type(value) in (int, float) and 0 <= value < 1 else "must be a number from 0 to below 1"


def _flag(value: Any) -> str | None:
    return None if type(value) is bool else "must be true or false"


def _name_or_null(value: Any) -> str | None:
    return None if value is None or (isinstance(value, str) and len(value) <= 1000) else "must be text or null"


def _targets(value: Any) -> str | None:
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, list) and texts and all(isinstance(text, str) and 0 < len(text) <= 1000 for text in texts)
    return None if good else "must be text or a list of names"


def _one_of(*known: Any) -> Callable[[Any], str | None]:
    return lambda value: (
        None if any(value is k or value == k for k in known) else f"must be one of {', '.join(map(str, known))}"
    )


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "r": _rank,
    "lora_alpha": _alpha,
    "lora_dropout": _dropout,
    "target_modules": _targets,
    "use_rslora": _flag,
    "fan_in_fan_out": _flag,
    "use_dora": _one_of(False),
    "bias": _one_of("none"),
    "lora_bias": _one_of(False),
    "modules_to_save": _one_of(None, []),
    "init_lora_weights": _one_of(*_HARMLESS_STARTS),
    "task_type": _one_of(None, *TASK_TYPES),
    "base_model_name_or_path": _name_or_null,
}
_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": None,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "task_type": None,
    "base_model_name_or_path": None,
    "rank_pattern": None,
    "alpha_pattern": None,
    "exclude_modules": None,
    "layers_to_transform": None,
}
