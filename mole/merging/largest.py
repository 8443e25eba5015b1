"""The k largest magnitudes among numbers that are made block by block: exact, at any size, with one block in memory.

Few are sorted. Of many: the bits of a number ≥ 0 are ordered as the number is. Three passes count the numbers under
each of 2²¹ values of the next 21 bits and go on with the one that holds the k-th largest (a radix selection); a fourth
finds the place of the last that is kept among equals, which are taken in the order in which they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 1 << 20  # so many numbers are held and sorted instead
_BITS = 21
_SIZE = 1 << _BITS


@dataclass(frozen=True)
class Cut:
    """Which magnitudes are among the largest: those above `threshold`, and equal ones up to the number `last`."""

    threshold: float
    last: int

    def keeps(self, values: Tensor, first: int) -> Tensor:
        """Which of `values` are kept, as bool; `first` is the number of the first of them in the order of blocks."""
        size = values.abs()
        kept = size > self.threshold
        equal = size == self.threshold
        if self.threshold > 0 and bool(equal.any()):
            places = torch.arange(first, first + values.numel(), device=values.device).view_as(values)
            kept = kept | (equal & (places <= self.last))
        return kept


def cut_of(blocks: Callable[[], Iterator[Tensor]], k: int) -> Cut:
    """The cut that keeps exactly the `k` largest magnitudes; zeros are never kept. `blocks` starts over at each call.

    The tensors are float64 and come in the same order, with the same bits, each time.
    """
    if k <= 0:
        return Cut(float("inf"), -1)
    if (held := _held(blocks)) is not None:
        return _cut_of_few(held, k)
    prefix, left = 0, k
    for shift in (2 * _BITS, _BITS, 0):
        counts = _counts(blocks, prefix, shift)
        above = counts.flip(0).cumsum(0)
        if int(above[-1]) < left:  # k is all of them or more
            return Cut(0.0, -1)
        place = int((above < left).sum())
        digit = _SIZE - 1 - place
        left -= int(above[place] - counts[digit])
        prefix = (prefix << _BITS) | digit
    threshold = float(torch.tensor(prefix, dtype=torch.int64).view(torch.float64))
    return Cut(threshold, _place_of(blocks, threshold, left) if threshold > 0 else -1)


def _held(blocks: Callable[[], Iterator[Tensor]]) -> Tensor | None:
    """All magnitudes in a row, if they are few."""
    found, count = [], 0
    for block in blocks():
        count += block.numel()
        if count > FEW:
            return None
        found.append(block.abs().flatten())
    return torch.cat(found)


def _cut_of_few(sizes: Tensor, k: int) -> Cut:
    if k > len(sizes):
        return Cut(0.0, -1)
    threshold = sizes.kthvalue(len(sizes) - k + 1).values
    equal = (sizes == threshold).nonzero().flatten()
    wanted = k - int((sizes > threshold).sum())
    return Cut(float(threshold), int(equal[wanted - 1]))


def _counts(blocks: Callable[[], Iterator[Tensor]], prefix: int, shift: int) -> Tensor:
    """How many numbers whose upper bits are `prefix` have each value in the next bits."""
    counts = torch.zeros(_SIZE, dtype=torch.int64)
    for block in blocks():
        bits = block.abs().contiguous().view(torch.int64).flatten()
        here = bits[bits >> (shift + _BITS) == prefix]
        counts += torch.bincount((here >> shift) & (_SIZE - 1), minlength=_SIZE).cpu()
    return counts


def _place_of(blocks: Callable[[], Iterator[Tensor]], threshold: float, wanted: int) -> int:
    """The number, in the order of blocks, of the `wanted`-th magnitude that equals `threshold`."""
    first = 0
    for block in blocks():
        places = (block.abs() == threshold).flatten().nonzero().flatten()
        if len(places) >= wanted:
            return first + int(places[wanted - 1])
        wanted -= len(places)
        first += block.numel()
    raise AssertionError("the blocks have changed between two passes")
