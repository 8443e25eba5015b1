"""Hashes that are the same on every machine, in every process, for ever: splitmix64, on numbers, tokens and names.

splitmix64: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators". Tensors are int64 and stand
for unsigned 64-bit numbers, whose sums and products wrap around.
"""

from __future__ import annotations

from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def splitmix64(number: int) -> int:
    """An unsigned 64-bit number → another: every bit of it changes about half of the bits."""
    z = (number + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def hash_of_text(text: str, seed: int) -> int:
    """Of its UTF-8 bytes, one after the other; unsigned, 64 bits."""
    state = splitmix64(seed & _MASK)
    for byte in text.encode():
        state = splitmix64(state ^ byte)
    return splitmix64(state ^ (1 << 32))  # which no byte is


def signed(number: int) -> int:
    """The number as int64 holds it."""
    return number - (1 << 64) if number >> 63 else number


def mixed(numbers: Tensor) -> Tensor:
    """`splitmix64` of every element of an int64 tensor."""
    z = numbers + signed(_GOLDEN)
    z = (z ^ _shifted(z, 30)) * signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * signed(_SECOND)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros following: int64 itself would repeat its sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def hash_of_tokens(ids: Tensor, counted: Tensor, seed: int) -> Tensor:
    """The tokens `counted` of each row, in their order: int64 [B, T], bool [B, T] → int64 [B].

    Padding takes no part, wherever it is.
    """
    places = mixed(counted.long().cumsum(1) + signed(splitmix64(seed & _MASK)))
    return mixed((mixed(ids + places) * counted).sum(1))


def non_negative(hashes: Tensor) -> Tensor:
    """The upper 63 bits, so that comparing them compares unsigned numbers."""
    return _shifted(hashes, 1)
