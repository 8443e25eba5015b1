"""Experts taken apart into their rank-one parts, each an expert of its own: `name#0`, `name#1`, …

B A = Σ_i b_i a_iᵀ, so equal weights of all parts of an expert give the expert, exactly; a router may weigh them apart
(the granularity of HiLoRA, arXiv 2510.12266).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mole.adapters import Adapter, LoraWeights

MARK = "#"


def exploded(experts: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Every expert as its parts, in order; tensors are views of the expert's.

    A part is absent where the expert has a lower rank. Raises ValueError, naming the expert, for what is no sum of
    parts of rank one: other kinds than LoRA, DoRA, trained biases and whole modules.
    """
    found: dict[str, Adapter] = {}
    for name, adapter in experts.items():
        _check(name, adapter)
        ranks = {path: weights.rank for path, weights in adapter.modules.items()}
        for place in range(max(ranks.values(), default=0)):
            parts = {path: _part(w, place) for path, w in adapter.modules.items() if place < ranks[path]}
            found[f"{name}{MARK}{place}"] = replace(adapter, modules=parts, targets=())
    return found


def parent_of(name: str) -> str:
    """The expert that a part was taken from; any other name is its own."""
    return name.rpartition(MARK)[0] or name


def _check(name: str, adapter: Adapter) -> None:
    reason = None
    if adapter.biases or adapter.full_modules:
        reason = "it trained biases or whole modules of the backbone"
    for path, weights in adapter.modules.items():
        if not isinstance(weights, LoraWeights):
            reason = f"at {path} it is no LoRA"
        elif weights.magnitude is not None:
            reason = f"at {path} it is DoRA, whose row lengths belong to the sum of its parts"
        elif weights.B.shape[1] != weights.rank:
            reason = f"at {path} it is a convolution in groups"
    if reason is not None:
        raise ValueError(f"explode=rank_one: expert {name!r} is no sum of parts of rank one: {reason}")


def _part(weights: LoraWeights, place: int) -> LoraWeights:
    """Rank one has the scale alpha: the expert's. Each part has its share of a bias."""
    only = slice(place, place + 1)
    bias = None if weights.bias is None else weights.bias / weights.rank
    return replace(weights, A=weights.A[only], B=weights.B[:, only], alpha=weights.scale, rslora=False, bias=bias)
