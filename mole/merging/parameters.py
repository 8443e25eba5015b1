"""Adapters that are no update of a matrix (bottlenecks, prompts, prefixes): their parameters are averaged, as they are.

That is no mean of what they do, since they are not linear in their parameters; it is what there is, and it needs equal
shapes at equal modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mole.adapters import Adapter


def averaged(
    experts: Mapping[str, Adapter], shares: Callable[[Sequence[str], str], dict[str, float]], dtype: torch.dtype
) -> dict[str, Any]:
    """Path → weights whose tensors are Σ c_e θ_e. Raises ValueError for experts that differ in more than values."""
    (first, *others), found = sorted(experts), {}
    for other in others:
        if experts[other].modules.keys() != experts[first].modules.keys():
            raise ValueError(
                f"the experts {first!r} and {other!r} adapt other modules: parameters are averaged place by place"
            )
    for path, like in experts[first].modules.items():
        parts = {name: experts[name].modules[path] for name in sorted(experts)}
        weights = shares(list(parts), path)
        for other, part in parts.items():
            if _outline(part) != _outline(like):
                raise ValueError(
                    f"{path}: the experts {first!r} and {other!r} are unlike in more than values: "
                    f"{_outline(like)} and {_outline(part)}"
                )
        mean = {
            name: _sum([weights[e] * part.tensors()[name].detach().double() for e, part in parts.items()], dtype)
            for name in like.tensors()
        }
        found[path] = dataclasses.replace(like, **mean)
    return found


def _sum(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack(tensors).sum(0).to("cpu", dtype)


def _outline(part: Any) -> dict[str, Any]:
    """Shapes of the tensors, and every setting."""
    tensors = part.tensors()
    settings = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name not in tensors}
    return {**{name: tuple(tensor.shape) for name, tensor in tensors.items()}, **settings}
