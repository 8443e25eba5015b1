"""The names of tensors in PEFT's LoRA files: what each of them is, and how it is named when written.

Beside the factors a file may hold biases of the backbone that were trained along (`bias`), whole modules
(`modules_to_save`), and copies of weights of the backbone (PEFT adds them where an embedding or the head is adapted).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mole.adapters.adapter import Adapter
from mole.adapters.lora import LoraWeights
from mole.untrusted import Damaged, Refused, shown

MAX_RANK = 4096
PREFIX = "base_model.model."
_PATH = r"((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)"
_PART = re.compile(
    rf"{_PATH}\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)",
    re.ASCII,
)
_BASE = re.compile(rf"{_PATH}\.base_layer\.(bias|weight)", re.ASCII)
_BIAS = re.compile(rf"{_PATH}\.bias", re.ASCII)
_SHORT = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


@dataclass
class Parts:
    """The tensors of a file, sorted out: path of a module → what there is of it."""

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    biases: dict[str, Tensor] = field(default_factory=dict)
    full_modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict)


def sort_out(tensors: dict[str, Tensor], settings: dict[str, Any], what: str) -> Parts:
    """Every tensor in its place. Raises Refused for one that belongs nowhere, Damaged where one is missing."""
    parts = Parts()
    full = re.compile(rf"({'|'.join(_ends(name) for name in settings['modules_to_save'] or [])})\.(.+)", re.ASCII)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if key == name or not _place(name, tensor, parts, settings, full):
            raise Refused(f"{what}: tensor {shown(key)} belongs to no LoRA factor of a module")
    if not parts.factors:
        raise Damaged(f"{what}: no tensor of a LoRA factor in it")
    for path, found in parts.factors.items():
        _check(path, found, settings, what)
    if settings["modules_to_save"] and not parts.full_modules:
        raise Damaged(f"{what}: modules_to_save names {shown(settings['modules_to_save'])}, which are not in it")
    return parts


def _place(name: str, tensor: Tensor, parts: Parts, settings: dict[str, Any], full: re.Pattern) -> bool:
    """Puts one tensor where it belongs; False if that is nowhere."""
    if match := _PART.fullmatch(name):
        path, short = match[1], _SHORT[match[2]]
        if "embedding" in match[2]:
            parts.embeddings.add(path)
        return parts.factors.setdefault(path, {}).setdefault(short, tensor) is tensor
    if settings["modules_to_save"] and (match := full.fullmatch(name)):
        # With bias="all" PEFT adds the untrained bias of the module that the trained one stands in for.
        if not match[2].startswith("original_module."):
            parts.full_modules.setdefault(match[1], {})[match[2].removeprefix("modules_to_save.")] = tensor
        return True
    if (match := _BASE.fullmatch(name)) and match[2] == "weight":
        parts.base_weights[match[1]] = tensor
        return True
    match = match or _BIAS.fullmatch(name)
    if match and settings["bias"] != "none":
        parts.biases[match[1]] = tensor
        return True
    return False


def _ends(name: str) -> str:
    """A path whose last components are `name`."""
    return rf"(?:[A-Za-z0-9_]+\.)*?{re.escape(name)}"


def _check(path: str, found: dict[str, Tensor], settings: dict[str, Any], what: str) -> None:
    for factor in "AB":
        if factor not in found:
            raise Damaged(f"{what}: {path} has no factor {factor}")
    try:
        LoraWeights(found["A"], found["B"], alpha=1.0)
    except ValueError:
        shapes = tuple(found["A"].shape), tuple(found["B"].shape)
        raise Damaged(
            f"{what}: {path} has factors of shapes {shapes[0]} and {shapes[1]}; wanted (r, in), (out, r)"
        ) from None
    if found["A"].shape[0] > MAX_RANK:
        raise Refused(f"{what}: {path} has rank {found['A'].shape[0]:,}; at most {MAX_RANK:,} is taken")
    for key, short in (("use_dora", "magnitude"), ("lora_bias", "bias")):
        if settings[key] != (short in found):
            raise Damaged(f"{what}: {key} is {settings[key]}, but {path} has {'a' if short in found else 'no'} {short}")
        if short in found and found[short].numel() != found["B"].shape[0]:
            shape = tuple(found[short].shape)
            raise Damaged(f"{what}: {path} has a {short} of shape {shape} for {found['B'].shape[0]} outputs")


def named(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's name → tensor, for everything that the adapter holds."""
    found: dict[str, Tensor] = {}
    for path, part in adapter.modules.items():
        middle, end = ("lora_embedding_", "") if part.embedding else ("lora_", ".weight")
        found[f"{path}.{middle}A{end}"], found[f"{path}.{middle}B{end}"] = part.A, part.B
        if part.magnitude is not None:
            found[f"{path}.lora_magnitude_vector"] = part.magnitude
        if part.bias is not None:
            found[f"{path}.lora_B.bias"] = part.bias
    for path, bias in adapter.biases.items():
        found[f"{path}.base_layer.bias" if path in adapter.modules else f"{path}.bias"] = bias
    for path, part in adapter.full_modules.items():
        found |= {f"{path}.{name}": tensor for name, tensor in part.items()}
    for path, weight in adapter.base_weights.items():
        found[f"{path}.base_layer.weight"] = weight
    return {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in found.items()}
