"""The two KV streams of a mixture as one batch, so that one forward advances both.

Rows 0 … B-1 are the mixture pass, rows B … 2B-1 the routing pass, which is one token ahead. The mixture's rows begin
one slot later, with slot 0 masked, so that both passes write to the same slot at each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mole.mixtures.two_pass.cache import TwoStreamCache

ROOM = 64  # slots added whenever the buffers are full, at least


class _JointLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room to grow; `rewrite` makes the last slot of some rows anew."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.length = keys.shape[-2]
        self.keys, self.values = keys, values
        self.rewrite: Tensor | slice | None = None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.rewrite is not None:
            rows, slot = self.rewrite, self.length - 1
            self.keys[rows, :, slot], self.values[rows, :, slot] = key_states[:, :, 0], value_states[:, :, 0]
            return self.keys[rows, :, : self.length], self.values[rows, :, : self.length]
        if self.length == self.keys.shape[-2]:
            self.keys, self.values = _wider(self.keys), _wider(self.values)
        self.keys[:, :, self.length], self.values[:, :, self.length] = key_states[:, :, 0], value_states[:, :, 0]
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length - (self.rewrite is not None)


def _one_later(mixture: Any, scaling: Any) -> Tensor:
    """[B, h, n, d] and [B, h, n + 1, d] → [2B, h, n + 1, d]; what was None never ran and cannot be here."""
    return torch.cat([torch.nn.functional.pad(mixture, (0, 0, 1, 0)), scaling])


def _wider(buffer: Tensor) -> Tensor:
    extra = max(ROOM, buffer.shape[-2] // 2)
    return torch.nn.functional.pad(buffer, (0, 0, 0, extra))


class JointCache(Cache):
    """Both streams of a `TwoStreamCache` whose routing pass is one token ahead of its mixture pass.

    Raises ValueError for streams that are not plain, growing and unwindowed.
    """

    def __init__(self, pair: TwoStreamCache):
        layers = []
        for mixture, scaling in zip(pair.mixture.layers, pair.scaling.layers, strict=True):
            if type(mixture) is not DynamicLayer or type(scaling) is not DynamicLayer:
                raise ValueError(
                    f"self-speculation needs plain dynamic caches, got layers of {type(mixture).__name__}: "
                    "generate without it for sliding windows, static and quantised caches"
                )
            layers.append(
                _JointLayer(_one_later(mixture.keys, scaling.keys), _one_later(mixture.values, scaling.values))
            )
        super().__init__(layers=layers)
        self.fingerprint = pair.fingerprint

    @property
    def slots(self) -> int:
        """Slots in use, the masked one included."""
        return self.layers[0].length  # type: ignore[attr-defined]

    def rewrite(self, rows: Tensor | slice | None) -> None:
        """The next forward replaces the last slot of these rows (a slice copies nothing); None: all get one more."""
        for layer in self.layers:
            layer.rewrite = rows  # type: ignore[attr-defined]

    def pair(self) -> TwoStreamCache:
        """The two streams apart again, up to the last token that both have seen."""
        mixture, scaling = DynamicCache(), DynamicCache()
        for index, layer in enumerate(self.layers):
            keys, values = layer.keys[:, :, : self.slots], layer.values[:, :, : self.slots]  # type: ignore[index]
            half = keys.shape[0] // 2
            mixture.update(keys[:half, :, 1:], values[:half, :, 1:], index)
            scaling.update(keys[half:, :, :-1], values[half:, :, :-1], index)
        return TwoStreamCache(mixture, scaling, self.fingerprint)
