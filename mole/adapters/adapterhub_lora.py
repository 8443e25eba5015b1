"""LoRA in AdapterHub's folders: factors under `<module>.loras.<name>`, those of GPT-2's merged q, k, v in one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mole.adapters.adapterhub_places import matched
from mole.adapters.lora import LoraWeights
from mole.adapters.loralib_format import unmerged
from mole.untrusted import Damaged, Refused, shown

UNRELIABLE_BEFORE = (1, 1, 0)  # versions whose stored scale of a LoRA is said to be wrong
_LORA = re.compile(r"((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)\.loras\.([^.]+)\.lora_(A|B)", re.ASCII)


def loras(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, alpha: float) -> dict[str, LoraWeights]:
    """Path of a module → its factors. Raises Damaged or Refused."""
    names = fields.get("attn_matrices", ["q", "v"])
    blocks = tuple(letter in names for letter in "qkv") if isinstance(names, list) else None
    found: dict[str, dict[str, Tensor]] = {}
    for _, tensor, match in matched(tensors, _LORA, where):
        found.setdefault(match[1], {})[match[3]] = tensor
    modules = {}
    for path, parts in found.items():
        if missing := sorted({"A", "B"} - set(parts)):
            raise Damaged(f"{where}: {path} has no factor {missing[0]}")
        A, B = parts["A"], parts["B"]
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] % B.shape[1]:
            raise Damaged(f"{where}: {path} has factors of shapes {tuple(A.shape)} and {tuple(B.shape)}")
        rank, own = B.shape[1], fields.get("r", B.shape[1])
        if own != rank:
            raise Damaged(f"{where}: rank {rank} in the weights of {path}, {shown(own)} in its config")
        if path.rsplit(".", 1)[-1] == "c_attn":
            A, B = unmerged(A, B, blocks, f"{where}: {path}")
        elif A.shape[0] != rank:
            raise Damaged(f"{where}: {path} has factors of shapes {tuple(A.shape)} and {tuple(B.shape)}")
        modules[path] = LoraWeights(A=A, B=B, alpha=alpha * A.shape[0] / rank)
    return modules


def alpha_of(fields: Mapping[str, Any], version: str | None, given: float | None, what: str) -> float:
    """The alpha of the training: `given`, else that of the config. Raises Refused where that is not to be trusted."""
    if given is not None:
        return given
    if _version(version) < UNRELIABLE_BEFORE:
        raise Refused(
            f"{what}: written by {shown(version or 'an old version')}, whose stored scale of a LoRA is said to be "
            "wrong; say the one of the training with alpha=…"
        )
    alpha: Any = fields.get("alpha")
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or not 0 < alpha <= 1e9:
        raise Refused(f"{what}: alpha is {shown(alpha)}; a number above 0 is wanted")
    return float(alpha)


def _version(text: str | None) -> tuple[int, ...]:
    match = re.fullmatch(r"adapters\.(\d{1,4})\.(\d{1,4})\.(\d{1,4}).*", text or "", re.ASCII)
    return tuple(map(int, match.groups())) if match else (0,)
