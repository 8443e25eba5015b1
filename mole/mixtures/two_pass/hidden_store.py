"""The last hidden states of the routing pass, kept from one epoch to the next.

With a frozen backbone and no experts in the routing pass its result is a constant of the example: computing it once
saves one of the three units of work of a training step from the second epoch on.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def store_bytes(lengths: Sequence[int], hidden_size: int, dtype: str) -> int:
    """What a store of sequences of these lengths will take on disk."""
    return sum(lengths) * hidden_size * DTYPES[dtype].itemsize


class HiddenStore:
    """Hidden states [n, H] by what made them: the tokens of a sequence, without padding, and their positions.

    They lie in a nameless file in `folder`, which is gone when the process ends, however it ends. `dtype`:
    float32, or bfloat16 for half the space at its precision. `hits` and `misses` count sequences. Where the disk is
    full nothing more is kept, and what is not kept is computed again.
    """

    def __init__(self, folder: Path, dtype: str = "float32"):
        self.dtype = DTYPES[dtype]
        self.hits = self.misses = 0
        self._index: dict[bytes, tuple[int, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 it lives as long as the store
        self._end, self._width, self._is_full = 0, 0, False

    def hidden_states(
        self,
        inputs: dict[str, Any],
        compute: Callable[[dict[str, Any]], Tensor],
        valid: Tensor | None = None,
        *,
        by_place: bool = False,
    ) -> Tensor:
        """[B, T, H] for `input_ids` [B, T] with `attention_mask`; `compute` serves the rows that are new.

        `valid` bool [B, T] tells padding where there is no mask. At padding the result is zero. `by_place`: without
        `position_ids` the backbone counts from the first slot of a row, padding or not, and the count matters. Raises
        ValueError without `input_ids`.
        """
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError("hidden states are kept for sequences of tokens, got no input_ids")
        mask = inputs.get("attention_mask") if valid is None else valid
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        positions = inputs.get("position_ids")
        if positions is None and by_place:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        keys = _keys(ids, real, positions)
        new = [row for row, key in enumerate(keys) if key not in self._index]
        self.misses += len(new)
        self.hits += len(keys) - len(new)
        found: dict[int, Tensor] = {}
        if new:
            rows = torch.tensor(new, device=ids.device)
            chosen = {k: v[rows] if isinstance(v, Tensor) and len(v) == len(ids) else v for k, v in inputs.items()}
            for row, states in zip(new, compute(chosen), strict=True):
                found[row] = self._kept(keys[row], states[real[row]])
        for row, key in enumerate(keys):
            if row not in found:
                found[row] = self._read(key)
        out = torch.zeros(*ids.shape, self._width, device=ids.device)
        for row, states in found.items():
            out[row, real[row]] = states.to(out)
        return out

    def close(self) -> None:
        """Gives the space back."""
        self._file.close()
        self._index.clear()

    def _kept(self, key: bytes, states: Tensor) -> Tensor:
        """Writes the states, if there is room; returns them as they will be read."""
        kept = states.detach().to(device="cpu", dtype=self.dtype).contiguous()
        self._width = kept.shape[-1]
        if key in self._index or self._is_full:  # the same sequence twice in a batch
            return kept
        data = kept.view(torch.uint8).numpy().tobytes()
        try:
            self._file.seek(self._end)
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            self._is_full = True
            logger.warning("hidden states are no longer kept (%s): those that are not are computed again", error)
            return kept
        self._index[key] = (self._end, len(data))
        self._end += len(data)
        return kept

    def _read(self, key: bytes) -> Tensor:
        begin, size = self._index[key]
        self._file.seek(begin)
        data, filled = bytearray(size), 0
        while filled < size:
            filled += self._file.readinto(memoryview(data)[filled:])
        return torch.frombuffer(data, dtype=self.dtype).view(-1, self._width)


def _keys(ids: Tensor, valid: Tensor, positions: Tensor | None) -> list[bytes]:
    """One digest per row: its real tokens, and their positions where they are given."""
    found = []
    rows = zip(
        ids.cpu(), valid.cpu(), [None] * len(ids) if positions is None else positions.expand_as(ids).cpu(), strict=True
    )
    for row, real, places in rows:
        digest = hashlib.sha256(row[real].contiguous().numpy().tobytes())
        if places is not None:
            digest.update(places[real].contiguous().numpy().tobytes())
        found.append(digest.digest())
    return found
