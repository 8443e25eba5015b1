"""PEFT's folder format: `adapter_config.json` and `adapter_model.safetensors`; the peft_* files alone know its names.

Which modules are adapted, and with which rank, is read from the tensors: a pattern in the config is never run.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mole.adapters import peft_ia3, peft_prompts
from mole.adapters.adapter import Adapter
from mole.adapters.lora import LoraWeights
from mole.adapters.peft_settings import MAX_CONFIG_BYTES, patterns, plain_targets, read_plain_settings, read_settings
from mole.adapters.peft_tensors import named, sort_out
from mole.untrusted import (
    MAX_WEIGHTS_BYTES,
    Damaged,
    Refused,
    read_file,
    refuse_pickles,
    safetensors_tensors,
    shown,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

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
    """A PEFT folder (LoRA, IA3, prefix or prompt tuning), each file read once.

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
    plain, notices = read_plain_settings(config, f"{where}/{CONFIG}", _OTHERS)
    if plain is not None:
        tensors = safetensors_tensors(weights, f"{where}/{WEIGHTS}")
        return PeftFolder(_other(plain, tensors, where), plain["base_model_name_or_path"], tuple(notices))
    return _lora(config, weights, where)


def _other(settings: dict[str, Any], tensors: dict[str, Any], where: str) -> Adapter:
    """An adapter of another method than LoRA."""
    method, read_tensors, _, _ = _OTHERS[settings["peft_type"]]
    full, tensors = _whole_modules(settings, tensors, method, f"{where}/{WEIGHTS}")
    modules = read_tensors(settings, tensors, f"{where}/{WEIGHTS}")
    return Adapter(
        method=method,
        modules=modules,
        targets=peft_ia3.plain_targets(settings, list(modules)),
        fan_in_fan_out=bool(settings.get("fan_in_fan_out", False)),
        task_type=settings["task_type"],
        full_modules=full,
        full_names=tuple(dict.fromkeys(settings["modules_to_save"] or ())) if full else (),
    )


def _whole_modules(
    settings: dict[str, Any], tensors: dict[str, Any], method: str, what: str
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Whole modules that were trained along, and the tensors that are left. Raises Damaged where none is there."""
    names, start = settings["modules_to_save"] or (), _start_of(method)
    full: dict[str, dict[str, Any]] = {}
    rest = dict(tensors)
    for key in tensors:
        path, _, short = key.removeprefix(start).rpartition(".")
        parts = path.split(".")
        place = next((i for i, part in enumerate(parts) if part in names), None)
        if key.startswith(start) and place is not None:
            whole = ".".join(parts[: place + 1])
            full.setdefault(whole, {})[".".join([*parts[place + 1 :], short])] = rest.pop(key)
    # PEFT names all heads that a model for classification may have.
    if names and not full and not set(names) <= {"classifier", "score"}:
        raise Damaged(f"{what}: modules_to_save names {shown(list(names))}, which are not in it")
    return full, rest


def _start_of(method: str) -> str:
    """What PEFT puts before a path: prompts wrap no module, so one part is missing."""
    return "base_model." if method in ("prompt", "prefix") else "base_model.model."


def _lora(config: bytes, weights: bytes, where: str) -> PeftFolder:
    settings, notices = read_settings(config, f"{where}/{CONFIG}")
    parts = sort_out(safetensors_tensors(weights, f"{where}/{WEIGHTS}"), settings, f"{where}/{WEIGHTS}")
    ranks = patterns(settings, "rank_pattern", f"{where}/{CONFIG}")
    alphas = patterns(settings, "alpha_pattern", f"{where}/{CONFIG}")
    if alphas.unreadable:
        raise Refused(f"{where}/{CONFIG}: alpha_pattern has {shown(alphas.unreadable[0])}; only plain names are read")
    modules = {}
    for path, found in parts.factors.items():
        rank = settings["r"] if (rule := ranks.find(path)) is None else rule
        if found["A"].shape[0] != rank and not ranks.unreadable:
            raise Damaged(f"{where}: rank {found['A'].shape[0]} in the weights of {path}, {rank} in {CONFIG}")
        alpha = settings["lora_alpha"] if (rule := alphas.find(path)) is None else rule
        modules[path] = LoraWeights(
            **found, alpha=float(alpha), rslora=settings["use_rslora"], embedding=path in parts.embeddings
        )
    adapter = Adapter(
        method="lora",
        modules=modules,
        dropout=float(settings["lora_dropout"]),
        targets=plain_targets(settings, list(modules)),
        fan_in_fan_out=settings["fan_in_fan_out"],
        task_type=settings["task_type"],
        biases=parts.biases,
        bias_kind=settings["bias"],
        full_modules=parts.full_modules,
        full_names=tuple(settings["modules_to_save"] or ()),
        base_weights=parts.base_weights,
    )
    return PeftFolder(adapter, settings["base_model_name_or_path"], tuple(notices))


def write(adapter: Adapter, folder: str | Path, backbone_name: str | None) -> None:
    """Write the two files into `folder`, which must exist. Arguments and errors are those of `dump`."""
    for name, data in dump(adapter, backbone_name).items():
        (Path(folder) / name).write_bytes(data)


def dump(adapter: Adapter, backbone_name: str | None) -> dict[str, bytes]:
    """The two files, name → bytes; equal adapters give equal bytes.

    `backbone_name` is noted in the config as the model that the adapter is for. Raises ValueError for a method that
    PEFT does not know, and for an adapter with DoRA or biases at some of its modules only.
    """
    if adapter.method == "lora":
        settings, tensors = _config(adapter, backbone_name), named(adapter)
    else:
        settings, tensors = _other_config(adapter, backbone_name)
    text = json.dumps(settings, indent=2, allow_nan=False) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: save(tensors, metadata={"format": "pt"})}


def has_place_for(method: str) -> bool:
    """Whether PEFT knows the method."""
    return method == "lora" or method in {row[0] for row in _OTHERS.values()}


def _other_config(adapter: Adapter, backbone_name: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a method other than LoRA. Raises ValueError for one that PEFT does not know."""
    row = next((item for item in _OTHERS.items() if item[1][0] == adapter.method), None)
    if row is None:
        raise ValueError(f"PEFT has no place for an adapter of method {adapter.method!r}")
    peft_type, (_, _, tensors_of, settings_of) = row
    common = {
        "base_model_name_or_path": backbone_name,
        "inference_mode": True,
        "peft_type": peft_type,
        "task_type": adapter.task_type,
    }
    if adapter.full_modules:
        common["modules_to_save"] = list(adapter.full_names)
    found, start = dict(tensors_of(adapter)), _start_of(adapter.method)
    for path, part in adapter.full_modules.items():
        found |= {f"{start}{path}.{name}": tensor for name, tensor in part.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    return dict(sorted({**common, **settings_of(adapter)}.items())), tensors


# PEFT's word → the method's name, what reads its tensors, what names them, what else the config says.
_OTHERS: dict[str, tuple[str, Any, Any, Any]] = {
    "IA3": ("ia3", peft_ia3.read, peft_ia3.named, peft_ia3.settings_of),
    "PREFIX_TUNING": ("prefix", peft_prompts.read_prefix, peft_prompts.named, peft_prompts.settings_of),
    "PROMPT_TUNING": ("prompt", peft_prompts.read_prompt, peft_prompts.named, peft_prompts.settings_of),
}


def _config(adapter: Adapter, backbone_name: str | None) -> dict[str, Any]:
    """What `adapter_config.json` says; the commonest rank and alpha are the rule, the others exceptions."""
    parts = adapter.modules
    rslora = all(part.rslora for part in parts.values())
    ranks = {path: part.rank for path, part in parts.items()}
    alphas = {path: part.alpha if part.rslora == rslora else part.scale * part.rank for path, part in parts.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    config = {
        "alpha_pattern": _exceptions(alphas, alpha),
        "base_model_name_or_path": backbone_name,
        "bias": adapter.bias_kind,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": list(adapter.full_names) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _exceptions(ranks, rank),
        "target_modules": list(adapter.targets or sorted(parts)),
        "task_type": adapter.task_type,
        "use_dora": _everywhere(adapter, "magnitude"),
        "use_rslora": rslora,
    }
    if _everywhere(adapter, "bias"):
        config["lora_bias"] = True
    return config


def _everywhere(adapter: Adapter, name: str) -> bool:
    """Whether all modules have that tensor. PEFT has one switch, so some with and some without is a ValueError."""
    found = {getattr(part, name) is not None for part in adapter.modules.values()}
    if len(found) > 1:
        raise ValueError(f"PEFT has no place for an adapter with a {name} at some of its modules only")
    return found == {True}


def _commonest(values: dict[str, Any]) -> Any:
    counts = Counter(values.values())
    return min(counts, key=lambda value: (-counts[value], value))


def _exceptions(values: dict[str, Any], rule: Any) -> dict[str, Any]:
    """Whole paths; PEFT takes the first that a module's path ends with, so that the longest has to come first."""
    rare = {path for path, value in values.items() if value != rule}
    ends = {path for path in values if any(path.endswith(f".{other}") for other in rare)} - rare
    return {path: values[path] for path in sorted(rare | ends, key=lambda path: (-len(path), path))}
