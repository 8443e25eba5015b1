"""Clusters of experts: k-means beside brute force, planted clusters found, choices of names."""

from itertools import product

import pytest
import torch

from mole.experts.clustering import k_means, mbc, random_clusters
from mole.experts.retrieval import by_chance, nearest

NAMES = [f"e{i}" for i in range(12)]


def best_by_brute_force(points, count):
    """The least sum of squares over every labelling that uses all labels."""
    best = float("inf")
    for labels in product(range(count), repeat=len(points)):
        if len(set(labels)) == count:
            groups = [points[[i for i, label in enumerate(labels) if label == c]] for c in range(count)]
            best = min(best, sum(float((g - g.mean(0)).square().sum()) for g in groups))
    return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_k_means_finds_the_best_of_all_labellings_given_restarts(seed, count):
    points = torch.randn(7, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels, cost = k_means(points, count, restarts=50)
    assert set(labels.tolist()) == set(range(count))
    if count < 7:
        assert cost == pytest.approx(best_by_brute_force(points, count))
    else:
        assert cost == 0
    again, _ = k_means(points, count, restarts=50)
    assert torch.equal(labels, again)


def test_equal_points_still_fill_every_cluster():
    labels, cost = k_means(torch.ones(5, 2, dtype=torch.float64), 3)
    assert (set(labels.tolist()), cost) == ({0, 1, 2}, 0)


def test_mbc_finds_planted_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0][:3]
    planted = [0, 1, 2, 0, 0, 1, 2, 2, 0, 1, 0, 0]
    rows = centres[planted] + 0.1 * torch.randn(12, 6, generator=generator, dtype=torch.float64)
    found = mbc(rows, NAMES, num_clusters=3)
    assert found == [[n for n, c in zip(NAMES, planted, strict=True) if c == want] for want in (0, 1, 2)]


def test_random_clusters_have_equal_sizes_and_every_name_once():
    found = random_clusters(NAMES, 5, seed=1)
    assert [len(group) for group in found] == [3, 3, 2, 2, 2]
    assert sorted(name for group in found for name in group) == sorted(NAMES)
    assert found != random_clusters(NAMES, 5, seed=2)


def test_more_clusters_than_experts_are_refused():
    with pytest.raises(ValueError, match="num_clusters=13 for 12 experts: wanted from 1 to 12"):
        random_clusters(NAMES, 13)


def test_the_nearest_come_by_likeness_then_by_name_after_those_included():
    likeness = {"a": 0.1, "c": 0.9, "b": 0.9, "d": -1.0}
    assert nearest(likeness, 3) == ["b", "c", "a"]
    assert nearest(likeness, 3, include=["d"]) == ["d", "b", "c"]


def test_a_choice_by_chance_does_not_go_by_order():
    found = by_chance(NAMES, 4, seed=7, include=["e3"])
    assert found == by_chance(NAMES[::-1], 4, seed=7, include=["e3"])
    assert (found[0], len(set(found))) == ("e3", 4)
    assert len({tuple(by_chance(NAMES, 4, seed=seed)) for seed in range(10)}) > 5


@pytest.mark.parametrize(
    ("k", "include", "told"),
    [
        (0, [], "k=0: wanted from 1 to 12"),
        (13, [], "k=13"),
        (1, ["e1", "e2"], "wanted from 2"),
        (3, ["x"], "no expert x"),
    ],
)
def test_impossible_choices_are_refused(k, include, told):
    with pytest.raises(ValueError, match=told):
        by_chance(NAMES, k, include=include)
