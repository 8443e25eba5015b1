"""Which experts to start from: the nearest to one that is given, or some by chance; the result is a list of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def nearest(similarities: Mapping[str, float], k: int, *, include: Sequence[str] = ()) -> list[str]:
    """`include`, then the names with the largest similarities, `k` in all; equal ones in alphabetical order.

    Similarities are cosines of updates or of embeddings, or a predictor's probabilities: larger is nearer. Raises
    ValueError as `check_choice` does.
    """
    check_choice(list(similarities), k, include)
    others = sorted((name for name in similarities if name not in include), key=lambda n: (-similarities[n], n))
    return [*include, *others[: k - len(include)]]


def by_chance(names: Sequence[str], k: int, *, seed: int = 42, include: Sequence[str] = ()) -> list[str]:
    """`include`, then others drawn without replacement, `k` in all; the same for any order of `names`."""
    check_choice(names, k, include)
    others = sorted(set(names) - set(include))
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
    return [*include, *(others[place] for place in order[: k - len(include)])]


def check_choice(names: Sequence[str], k: int, include: Sequence[str]) -> None:
    """Raises ValueError unless `k` names can be chosen, those of `include` among them."""
    if odd := [name for name in include if name not in names]:
        raise ValueError(f"include: no expert {', '.join(odd)} (there are {', '.join(sorted(names))})")
    if len(set(include)) < len(include):
        raise ValueError(f"include: {', '.join(include)} names an expert twice")
    if not max(1, len(include)) <= k <= len(set(names)):
        raise ValueError(
            f"k={k}: wanted from {max(1, len(include))} to {len(set(names))}, as many as there are experts"
        )
