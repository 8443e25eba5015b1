"""Names of AdapterHub's tensors: where its models keep a bottleneck, and the module of a backbone that it is at."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from mole.backbones.sites import FAMILIES, PARTS, Kind, Place
from mole.untrusted import Damaged, Refused, shown

# The kinds of backbones that both know. Of a post-norm block AdapterHub adapts the output modules themselves, of others
# it adds modules to the block.
KNOWN = ("bert", "deberta-v2", "electra", "gpt2", "llama", "mistral", "roberta", "xlm-roberta")
_ADDED = {"attention": "attention_adapters", "ffn": "output_adapters"}
_BLOCK = r"((?:.+\.)?(?:layers?|h)\.(\d+)\.)"


class Spot(NamedTuple):
    """One place: `module` what the backbone calls it, `home` what AdapterHub does; its block, sub-layer and kind."""

    module: str
    home: str
    layer: int
    part: str
    kind: Kind

    @property
    def order(self) -> tuple[int, int]:
        """Of execution."""
        return self.layer, PARTS.index(self.part)


def places(model_type: str) -> dict[str, tuple[str, Place]]:
    """Sub-layer → the end of its path at AdapterHub, and its place. Raises ValueError for unknown backbones."""
    if model_type not in KNOWN:
        raise ValueError(f"bottlenecks for model_type {shown(model_type)}; known: {', '.join(KNOWN)}")
    family = FAMILIES[model_type]
    return {part: (place.end if place.kind == "output" else _ADDED[part], place) for part, place in family.items()}


def is_post_norm(model_type: str) -> bool:
    """Whether its sub-layers end in a norm. Raises ValueError for unknown backbones."""
    return any(place.kind == "output" for _, place in places(model_type).values())


def by_home(path: str, model_type: str) -> Spot | None:
    """The place that AdapterHub calls `path`; None if it is none."""
    for part, (end, place) in places(model_type).items():
        if match := re.fullmatch(_BLOCK + re.escape(end), path, re.ASCII):
            return Spot(f"{match[1]}{place.end}", path, int(match[2]), part, place.kind)
    return None


def by_module(path: str, model_type: str) -> Spot | None:
    """The place that the backbone calls `path`; None if it is none."""
    for part, (end, place) in places(model_type).items():
        if match := re.fullmatch(_BLOCK + re.escape(place.end), path, re.ASCII):
            return Spot(path, f"{match[1]}{end}", int(match[2]), part, place.kind)
    return None


def matched(tensors: Mapping[str, Tensor], pattern: re.Pattern[str], where: str) -> list[tuple[str, Tensor, re.Match]]:
    """Every tensor with its name taken apart. Raises Refused for another one, and for those of several adapters."""
    found = []
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            raise Refused(f"{where}: tensor {shown(key)} belongs to no place of this adapter")
        found.append((key, tensor, match))
    names = sorted({match[2] for _, _, match in found})
    if len(names) > 1:
        raise Refused(f"{where}: tensors of several adapters ({', '.join(names[:4])}); give the folder of one")
    if not found:
        raise Damaged(f"{where}: no tensor in it")
    return found
