"""Tensors of a log that moved from memory to disk, and go from there by themselves when nobody holds them."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class _File:
    """An array on disk, removed when the last tensor that lies in it is let go, or at exit."""

    def __init__(self, path: Path, array: np.ndarray):
        self.path = path
        weakref.finalize(self, path.unlink, missing_ok=True)
        np.save(path, array)


class Spilled:
    """One tensor, a row of a file."""

    def __init__(self, file: _File, row: int):
        self._file, self._row = file, row

    def read(self) -> Tensor:
        """The tensor; its data are read when they are looked at."""
        return torch.from_numpy(np.load(self._file.path, mmap_mode="c")[self._row])

    def __reduce__(self):
        # A copy, or what was pickled, is a tensor in memory: the file belongs to this one and goes with it.
        return torch.from_numpy, (self.read().numpy().copy(),)


def spill(tensors: list[Tensor], folder: Path) -> list[Spilled]:
    """Writes tensors of one shape and dtype to a new file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="spill-", suffix=".npy", dir=folder)
    os.close(handle)
    file = _File(Path(name), torch.stack(tensors).numpy())
    return [Spilled(file, row) for row in range(len(tensors))]
