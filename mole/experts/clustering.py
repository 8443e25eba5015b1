"""Model-based clustering: experts that are alike share a cluster, and one new expert is trained for each.

Embeddings → their cosines → k-means on the rows of that matrix (Ostapenko et al., 2024, arXiv 2405.11157). Random
clusters of equal sizes are the control.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 10  # clusters, where nobody says how many: fewer for fewer experts


def mbc(embedding: Tensor, names: Sequence[str], num_clusters: int = 10, *, restarts: int = 10, seed: int = 42):
    """Clusters of `names` by the rows of `embedding` [E, k], largest first, each in the order of `names`."""
    rows = torch.nn.functional.normalize(embedding.double(), dim=1)
    labels, _ = k_means(rows @ rows.T, num_clusters, restarts=restarts, seed=seed)
    return _grouped(labels.tolist(), names)


def random_clusters(names: Sequence[str], num_clusters: int = 10, *, seed: int = 42) -> list[list[str]]:
    """Clusters by chance, whose sizes differ by one at most, largest first."""
    _check(len(names), num_clusters)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [0] * len(names)
    for place, index in enumerate(order):
        labels[index] = place % num_clusters
    return _grouped(labels, names)


def k_means(
    points: Tensor, num_clusters: int, *, restarts: int = 10, seed: int = 42, steps: int = 300
) -> tuple[Tensor, float]:
    """The label of each of `points` [n, d], and the sum of squared distances to the clusters' means.

    Lloyd's iterations from k-means++ starts, the best of `restarts`; an empty cluster takes the farthest point. Raises
    ValueError for more clusters than points.
    """
    _check(len(points), num_clusters)
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(points, _starts(points, num_clusters, generator), steps) for _ in range(max(1, restarts))]
    return min(runs, key=lambda run: run[1])


def _starts(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a point drawn by its squared distance to the centres so far."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    for _ in range(count - 1):
        gaps = _squares(points, points[chosen]).min(1).values
        weights = gaps if float(gaps.sum()) > 0 else torch.ones(len(points), dtype=points.dtype)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen]


def _lloyd(points: Tensor, centres: Tensor, steps: int) -> tuple[Tensor, float]:
    labels = torch.full((len(points),), -1)
    for _ in range(steps):
        gaps = _squares(points, centres)
        new = gaps.argmin(1)
        for empty in sorted(set(range(len(centres))) - set(new.tolist())):
            farthest = int(gaps.gather(1, new[:, None]).masked_fill(_alone(new)[:, None], -1).argmax())
            new[farthest] = empty
            gaps[farthest, empty] = 0
        if torch.equal(new, labels):
            break
        labels = new
        centres = torch.stack([points[labels == cluster].mean(0) for cluster in range(len(centres))])
    return labels, float(_squares(points, centres).gather(1, labels[:, None]).sum())


def _alone(labels: Tensor) -> Tensor:
    """Which points are the only ones of their cluster: taking one away would leave it empty."""
    return labels.bincount()[labels] == 1


def _squares(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [n, k]."""
    return (points[:, None] - centres).square().sum(-1)


def _check(count: int, num_clusters: int) -> None:
    if not 1 <= num_clusters <= count:
        raise ValueError(f"num_clusters={num_clusters} for {count} experts: wanted from 1 to {count}")


def _grouped(labels: Sequence[int], names: Sequence[str]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for label, name in zip(labels, names, strict=True):
        groups.setdefault(label, []).append(name)
    return sorted(groups.values(), key=lambda group: (-len(group), list(names).index(group[0])))
