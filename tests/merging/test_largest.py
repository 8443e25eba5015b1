"""The k largest magnitudes: exactly as many, whatever the numbers and however they are cut into blocks."""

import pytest
import torch

from mole.merging import largest
from mole.merging.largest import cut_of


def numbers(kind, size=5000):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    if kind == "many_zeros":
        values[torch.rand(size, generator=generator) < 0.9] = 0.0
    if kind == "few_values":
        values = values.round()
    if kind == "wide_range":
        values = values * 10.0 ** (300 * torch.rand(size, generator=generator, dtype=torch.float64) - 200)
    if kind == "negative_zeros":
        values = -torch.zeros(size, dtype=torch.float64)
    return values


def kept(values, k, step):
    def blocks():
        return iter(values.split(step))

    cut = cut_of(blocks, k)
    return torch.cat(
        [cut.keeps(block, first) for first, block in zip(range(0, len(values), step), blocks(), strict=True)]
    )


@pytest.mark.parametrize("few", [1 << 20, 0], ids=["sorted", "counted"])
@pytest.mark.parametrize("step", [5000, 1777])
@pytest.mark.parametrize("kind", ["any", "many_zeros", "few_values", "wide_range", "negative_zeros"])
def test_exactly_the_k_largest_are_kept_and_no_zero(kind, step, few, monkeypatch):
    monkeypatch.setattr(largest, "FEW", few)
    values = numbers(kind)
    for k in (0, 300, 1000, 5000, 6000):
        mask = kept(values, k, step)
        assert int(mask.sum()) == min(k, int((values != 0).sum()))
        if mask.any() and not mask.all():
            assert values[mask].abs().min() >= values[~mask].abs().max()


def test_of_equal_ones_the_first_are_kept(monkeypatch):
    for few in (1 << 20, 0):
        monkeypatch.setattr(largest, "FEW", few)
        mask = kept(torch.tensor([2.0, -1.0, 1.0, 1.0, 3.0, -1.0], dtype=torch.float64), 4, 2)
        assert mask.tolist() == [True, True, True, False, True, False]


@pytest.mark.slow
def test_more_numbers_than_2_to_the_24_and_mostly_zeros():
    size, rows = 1 << 22, 5
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(size, generator=generator, dtype=torch.float64).relu() for _ in range(rows)]
    k = int(0.2 * size * rows)
    cut = cut_of(lambda: iter(parts), k)
    assert sum(int(cut.keeps(part, i * size).sum()) for i, part in enumerate(parts)) == k
