"""The weights of nlpr's multi-adapters, as safetensors: bottlenecks of two layers in the outputs of an encoder.

Size and places are read from the tensors; the activation is gelu. A bottleneck reads h in the output module of its
sub-layer. LayerNorms that were trained along are the adapter's own; pooler and classifier are whole modules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mole.adapters.adapter import Adapter
from mole.adapters.bottleneck import BottleneckWeights
from mole.adapters.norm import NormWeights
from mole.untrusted import Damaged, Refused, safetensors_tensors, shown

_PATH = r"((?:[A-Za-z0-9_]+\.)*"
_PROJECT = re.compile(rf"{_PATH}output)\.adapter\.(down|up)_project\.(weight|bias)", re.ASCII)
_NORM = re.compile(rf"{_PATH}LayerNorm)\.(weight|bias)", re.ASCII)
_FULL = re.compile(rf"{_PATH}(?:pooler|classifier))\.((?:dense\.|out_proj\.)?(?:weight|bias))", re.ASCII)
_SHORT = {
    ("down", "weight"): "down",
    ("down", "bias"): "down_bias",
    ("up", "weight"): "up",
    ("up", "bias"): "up_bias",
}
FULL_NAMES = ("pooler", "classifier")


def is_nlpr(names: Sequence[str]) -> bool:
    """Whether these are names of tensors in such a file."""
    return any(_PROJECT.fullmatch(name) for name in names)


def parse(weights: bytes, where: str) -> Adapter:
    """The adapter in the bytes of a safetensors file; `where` names it in errors. Raises Damaged or Refused."""
    found: dict[str, dict[str, Any]] = {}
    norms: dict[str, dict[str, Any]] = {}
    full: dict[str, dict[str, Tensor]] = {}
    for name, tensor in safetensors_tensors(weights, where).items():
        if match := _PROJECT.fullmatch(name):
            found.setdefault(match[1], {})[_SHORT[match[2], match[3]]] = tensor
        elif match := _NORM.fullmatch(name):
            norms.setdefault(match[1], {})[match[2]] = tensor
        elif match := _FULL.fullmatch(name):
            full.setdefault(match[1], {})[match[2]] = tensor
        else:
            raise Refused(
                f"{where}: tensor {shown(name)} is neither of a bottleneck nor a LayerNorm, pooler or classifier: only "
                "what was trained is wanted, not the whole model"
            )
    if not found:
        raise Damaged(f"{where}: no tensor of a bottleneck in it")
    modules: dict[str, Any] = {path: _bottleneck(path, parts, where) for path, parts in found.items()}
    modules |= {path: _norm(path, parts, where) for path, parts in norms.items()}
    names = tuple(name for name in FULL_NAMES if any(name in path.split(".") for path in full))
    return Adapter("bottleneck", modules, task_type="SEQ_CLS", full_modules=full, full_names=names)


def _bottleneck(path: str, parts: dict[str, Any], where: str) -> BottleneckWeights:
    if missing := sorted(set(_SHORT.values()) - set(parts)):
        raise Damaged(f"{where}: {path} has no tensor {missing[0]}")
    try:
        return BottleneckWeights(**parts, activation="gelu", reads="h")
    except ValueError as error:
        raise Damaged(f"{where}: {path}: {error}") from None


def _norm(path: str, parts: dict[str, Any], where: str) -> NormWeights:
    if missing := sorted({"weight", "bias"} - set(parts)):
        raise Damaged(f"{where}: {path} has no tensor {missing[0]}")
    try:
        return NormWeights(parts["weight"], parts["bias"])
    except ValueError as error:
        raise Damaged(f"{where}: {path}: {error}") from None
