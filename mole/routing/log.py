"""The routing log: what every forward routed, kept within a limit of memory, then written to files (`log_files.py`).

One log serves every router. It is a listener of the model: `record` once per forward, `flush` at the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mole.registry import unknown
from mole.routing.log_files import (
    INDEX,
    MASKED,
    PHASES,
    LoggedRouting,
    LoggedRun,
    base_path,
    index_text,
    join_sequences,
    load_routing_log,
    read_arrays,
    write_arrays,
)
from mole.routing.spill import Spilled, spill
from mole.run_folder import write_atomically

__all__ = ["LoggedRouting", "LoggedRun", "RoutingLog", "load_routing_log", "load_scalings_log"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
logger = logging.getLogger(__name__)


@dataclass
class _Entry:
    """One forward. `weights` and `tokens` keep size 1 where they are broadcast; `shape` is the full [B, S, L, E]."""

    shape: tuple[int, int, int, int]
    weights: Tensor | Spilled
    tokens: Tensor | Spilled | None  # int32 [B, S], -1 at padding
    mask: Tensor | None  # bool [B, S], only where there are no tokens
    task_names: tuple[str, ...] | None
    phase: str
    rows: tuple[int, ...] | None
    continues: bool

    @property
    def bytes(self) -> int:
        """What it takes of memory now."""
        held = (self.weights, self.tokens, self.mask)
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))

    def full(self) -> Tensor:
        """float32 [B, S, L, E], a view where layers share their weights."""
        return _read(self.weights).float().expand(self.shape)

    def logged(self, *, with_weights: bool = True) -> LoggedRouting:
        batch, length = self.shape[:2]
        tokens = None if self.tokens is None else _read(self.tokens).numpy().astype(np.int64)
        if tokens is not None:
            mask = tokens != MASKED
        else:
            mask = np.ones((batch, length), dtype=bool) if self.mask is None else self.mask.numpy()
        return LoggedRouting(
            weights=self.full().numpy() if with_weights else np.empty(0, dtype=np.float32),
            mask=mask,
            tokens=tokens,
            task_names=self.task_names,
            phases=(self.phase,) * length,
            rows=self.rows,
            continues=self.continues,
        )


def _read(held: Tensor | Spilled) -> Tensor:
    return held.read() if isinstance(held, Spilled) else held


class RoutingLog:
    """Keeps the weights of each forward, detached and on the CPU.

    `layer_names` and `expert_names` are in the mixture's order. Over `max_entries` forwards or `max_bytes` bytes of
    memory, entries go to files under `spill_dir`; without one the oldest are dropped, counted in `log_dropped`. Every
    `every`-th forward is kept. `dtype` is what memory holds (float32, float16, bfloat16); files are float32.

    `end_ids`: token ids that end a text (end-of-sequence, padding). A generated row that has ended is fed such ids
    until the whole batch is done; in the phase `decode` they count as padding. Set it before generating.
    """

    def __init__(
        self,
        layer_names: Sequence[str],
        expert_names: Sequence[str],
        *,
        max_entries: int | None = None,
        max_bytes: int | None = 2**30,
        every: int = 1,
        spill_dir: str | os.PathLike[str] | None = None,
        dtype: str = "float32",
    ):
        for what, value in (("max_entries", max_entries), ("max_bytes", max_bytes), ("every", every)):
            if value is not None and value < 1:
                raise ValueError(f"{what} of a routing log must be at least 1, got {value}")
        if dtype not in DTYPES:
            raise ValueError(unknown("dtype of a routing log", dtype, DTYPES))
        self.layer_names, self.expert_names = tuple(layer_names), tuple(expert_names)
        self.max_entries, self.max_bytes, self.every = max_entries, max_bytes, every
        self.spill_dir = None if spill_dir is None else Path(spill_dir)
        self.dtype = dtype
        self.end_ids: tuple[int, ...] = ()
        self.enabled = True
        self.log_dropped = 0
        self._entries: list[_Entry] = []
        self._in_memory: list[_Entry] = []  # of these, the ones that are not spilled
        self._bytes = 0
        self._forwards = 0
        self._last_kept = -2
        self._rows: tuple[int, ...] | None = None
        self._copying: set[torch.device] = set()

    def __len__(self) -> int:
        return len(self._entries)

    # ---- recording
    def record(
        self,
        scalings: Tensor,
        *,
        token_ids: Tensor | None = None,
        mask: Tensor | None = None,
        task_names: Sequence[str] | None = None,
        phase: str = "train",
    ) -> None:
        """Appends one forward; nothing while the log is stopped.

        `scalings` float [B, S, 1|L, E] (1: all layers share them); `token_ids` int and `mask` (1 at valid tokens)
        [B, S]; `task_names` one per row; `phase` train, eval, prefill or decode. A decode forward goes on where the
        forward before it stopped; any other begins a text. Raises ValueError if the shapes do not fit the names.
        """
        if not self.enabled:
            return
        number, self._forwards = self._forwards, self._forwards + 1
        if number % self.every:
            return
        self._check(scalings, token_ids, mask, task_names, phase)
        batch, length = scalings.shape[:2]
        continues = phase == "decode" and self._last_kept == number - 1
        tokens = None if token_ids is None else self._marked(token_ids, mask, phase)
        entry = _Entry(
            shape=(batch, length, len(self.layer_names), len(self.expert_names)),
            weights=self._kept(_narrow(scalings), DTYPES[self.dtype]),
            tokens=None if tokens is None else self._kept(tokens, torch.int32),
            mask=None if mask is None or token_ids is not None else self._kept(mask, torch.bool),
            task_names=None if task_names is None else tuple(task_names),
            phase=phase,
            rows=self._rows if continues else None,
            continues=continues,
        )
        self._rows, self._last_kept = None, number
        self._entries.append(entry)
        self._in_memory.append(entry)
        self._bytes += entry.bytes
        self._stay_within_limits()

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Beams changed places: row i of the next forward continues row `rows[i]` of the forward before it."""
        order = tuple(int(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows))
        self._rows = order if self._rows is None else tuple(self._rows[row] for row in order)

    def _check(
        self,
        scalings: Tensor,
        token_ids: Tensor | None,
        mask: Tensor | None,
        task_names: Sequence[str] | None,
        phase: str,
    ) -> None:
        layers, experts = len(self.layer_names), len(self.expert_names)
        if scalings.dim() != 4 or scalings.shape[2] not in (1, layers) or scalings.shape[3] != experts:
            raise ValueError(
                f"scalings must be [B, S, 1 or {layers}, {experts}] for {layers} layers and {experts} experts, "
                f"got {list(scalings.shape)}"
            )
        for what, given in (("token_ids", token_ids), ("mask", mask)):
            if given is not None and given.shape != scalings.shape[:2]:
                raise ValueError(f"{what} must be {list(scalings.shape[:2])} as the scalings, got {list(given.shape)}")
        if task_names is not None and len(task_names) != len(scalings):
            raise ValueError(f"{len(scalings)} rows need as many task names, got {len(task_names)}")
        if phase not in PHASES:
            raise ValueError(unknown("phase", phase, PHASES))

    def _marked(self, token_ids: Tensor, mask: Tensor | None, phase: str) -> Tensor:
        valid = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.to(token_ids.device).bool()
        if phase == "decode":
            for token in self.end_ids:
                valid = valid & (token_ids != token)
        return torch.where(valid, token_ids, MASKED)

    def _kept(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of its own on the CPU; from an accelerator without waiting for it."""
        tensor = tensor.detach()
        if tensor.device.type == "cpu":
            return tensor.to(dtype, copy=True).contiguous()
        self._copying.add(tensor.device)
        return tensor.to(dtype).contiguous().to("cpu", non_blocking=True)

    def _wait(self) -> None:
        """Until copies from accelerators have arrived; before anything is read."""
        for device in self._copying:
            torch.accelerator.synchronize(device)
        self._copying.clear()

    # ---- limits
    def _over(self) -> bool:
        return (self.max_bytes is not None and self._bytes > self.max_bytes) or (
            self.max_entries is not None and len(self._in_memory) > self.max_entries
        )

    def _stay_within_limits(self) -> None:
        if not self._over():
            return
        if self.spill_dir is not None:
            self._spill()
            return
        if not self.log_dropped:
            logger.warning(
                "the routing log has reached its limit (max_entries=%s, max_bytes=%s): the oldest forwards are dropped",
                self.max_entries,
                self.max_bytes,
            )
        while self._over():
            oldest = self._in_memory.pop(0)
            self._entries.pop(0)
            self._bytes -= oldest.bytes
            self.log_dropped += 1

    def _spill(self) -> None:
        """Everything in memory goes to disk, one file per shape."""
        self._wait()
        assert self.spill_dir is not None
        buckets: dict[tuple, list[_Entry]] = {}
        for entry in self._in_memory:
            buckets.setdefault((_read(entry.weights).shape, entry.tokens is not None, entry.shape), []).append(entry)
        for entries in buckets.values():
            for index, spilled in enumerate(spill([_read(entry.weights).float() for entry in entries], self.spill_dir)):
                entries[index].weights = spilled
            if entries[0].tokens is not None:
                tokens = [_read(entry.tokens) for entry in entries if entry.tokens is not None]
                for index, spilled in enumerate(spill(tokens, self.spill_dir)):
                    entries[index].tokens = spilled
        self._in_memory, self._bytes = [], 0

    # ---- reading
    def entries(self) -> list[Tensor]:
        """The kept forwards, oldest first: float32 [B, S, L, E] each, a view where layers share their weights."""
        self._wait()
        return [entry.full() for entry in self._entries]

    def sequences(self) -> list[Tensor]:
        """As `entries`, with the forwards of one `generate` call joined along S, and beams followed back."""
        self._wait()
        return [torch.from_numpy(joined.weights) for joined in join_sequences(e.logged() for e in self._entries)]

    def buckets(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Sequence length → (indices of the forwards of that length, their weights)."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for index, weights in enumerate(self.entries()):
            indices, tensors = found.setdefault(weights.shape[1], ([], []))
            indices.append(index)
            tensors.append(weights)
        return found

    def clear(self) -> None:
        """Forgets everything that was recorded, spilled files included."""
        self._wait()
        self._entries, self._in_memory, self._bytes = [], [], 0
        self._rows, self._last_kept, self.log_dropped = None, -2, 0
        self._forwards = 0

    def flush(
        self,
        path: str | os.PathLike[str],
        overwrite: bool = False,
        *,
        index: bool = True,
        decode: Callable[[list[int]], list[str]] | None = None,
        allow_disabled: bool = False,
    ) -> list[Path]:
        """Writes the log under `path` (no extension), then clears it; returns the files written.

        `index` adds `index.json` beside them, last; `decode` gives the text of each of a row's token ids, kept in the
        index. Raises RuntimeError if the log is stopped (`allow_disabled` flushes it all the same), ValueError if it
        is empty, FileExistsError if a log is there and `overwrite` is false. On any error the log is kept.
        """
        if not self.enabled and not allow_disabled:
            raise RuntimeError("Scalings logging is disabled!")
        if not self._entries:
            raise ValueError("No log scalings to flush.")
        self._wait()
        base = base_path(path)
        index_path = Path(base).parent / INDEX
        entries = [entry.logged(with_weights=False) for entry in self._entries]
        run = LoggedRun(self.layer_names, self.expert_names, entries, self.log_dropped)
        text = index_text(run, base, decode) if index else ""
        shapes = [entry.shape for entry in self._entries]
        written = write_arrays(
            base,
            shapes,
            lambda row: self._entries[row].full().numpy(),
            index=index_path if index else None,
            overwrite=overwrite,
        )
        if index:
            write_atomically(index_path, text)
            written.append(index_path)
        self.clear()
        return written


def _narrow(tensor: Tensor) -> Tensor:
    """Without the copies of broadcast axes (stride 0): what is one row stays one row."""
    for axis in range(tensor.dim() - 1):
        if tensor.shape[axis] > 1 and tensor.stride(axis) == 0:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def load_scalings_log(path: str | os.PathLike[str], verbose: bool = False, mmap: bool = False) -> list[Tensor]:
    """The forwards written under `path` (with or without `.npy`), in order: float32 [1, B, S, L, E] each.

    Reads X-LoRA's own files as well. `verbose` prints a line per file; with `mmap` the data stay on disk until they
    are looked at. Raises FileNotFoundError if there is no log, ValueError if its files do not fit together.
    """
    return [torch.from_numpy(array).unsqueeze(0) for array in read_arrays(path, verbose=verbose, mmap=mmap)]
