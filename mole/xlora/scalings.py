"""The log of a model's scalings: switched on and off, read, printed, written; `mole.routing.log` keeps it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from mole.routing.log import RoutingLog

_LIMITS = ("max_entries", "max_bytes", "every", "spill_dir", "dtype")


class ScalingsLog:
    """Joins and leaves the `listeners` of a model with these layers and experts."""

    def __init__(self, listeners: list[Any], layer_names: tuple[str, ...], expert_names: tuple[str, ...]):
        self._listeners = listeners
        self._names = layer_names, expert_names
        self.log: RoutingLog | None = None

    def start(self, limits: dict[str, Any]) -> None:
        """Every forward is kept from now on, behind what was kept before."""
        fresh = RoutingLog(*self._names, **limits)
        if self.log is None:
            self.log = fresh
        for name in _LIMITS:
            setattr(self.log, name, getattr(fresh, name))
        self.log.enabled = True
        if not any(listener is self.log for listener in self._listeners):
            self._listeners.append(self.log)

    def stop(self, clear: bool) -> None:
        """Nothing more is kept; what was kept stays unless `clear`."""
        if self.log is None:
            return
        self.log.enabled = False
        self._listeners[:] = [listener for listener in self._listeners if listener is not self.log]
        if clear:
            self.log.clear()

    def clear(self) -> None:
        if self.log is not None:
            self.log.clear()

    def entries(self) -> list[Tensor]:
        return [] if self.log is None else self.log.entries()

    def sequences(self) -> list[Tensor]:
        return [] if self.log is None else self.log.sequences()

    def buckets(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        return {} if self.log is None else self.log.buckets()

    @property
    def dropped(self) -> int:
        return 0 if self.log is None else self.log.log_dropped

    def flush(self, path: str | os.PathLike[str], *, overwrite: bool, allow_disabled: bool, index: bool) -> list[Path]:
        log = self.log
        if log is None:
            log = RoutingLog(*self._names)
            log.enabled = False
        return log.flush(path, overwrite, index=index, allow_disabled=allow_disabled)

    def show(self, count: int) -> None:
        """The next `count` forwards go to stdout."""
        self._listeners[:] = [listener for listener in self._listeners if not isinstance(listener, _Printer)]
        if count:
            self._listeners.append(_Printer(count, self._listeners))


class _Printer:
    """Prints the scalings of a few forwards, then leaves."""

    def __init__(self, count: int, listeners: list[Any]):
        self.left, self.listeners = count, listeners

    def record(self, scalings: Tensor, *, phase: str, **_: Any) -> None:
        print(f"scalings [B, S, L, E] = {list(scalings.shape)} ({phase}):\n{scalings.tolist()}")
        self.left -= 1
        if not self.left:
            self.listeners[:] = [listener for listener in self.listeners if listener is not self]
