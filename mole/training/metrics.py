"""metrics.jsonl: one JSON object for each logged step, and on a resumed run only those that still hold."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class MetricsFile:
    """Appends lines; knows how many bytes are surely there. A full disk delays lines, it neither loses nor tears them.

    An inactive one (of the processes that are not the main one) does nothing.
    """

    def __init__(self, path: Path, active: bool = True):
        self.path, self.active = path, active
        self.offset = 0
        self._waiting = b""

    def start(self, offset: int = 0) -> None:
        """Cuts the file to its first `offset` bytes: what came after them is done again.

        Raises ValueError if it is shorter than that.
        """
        if not self.active:
            return
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < offset:
            raise ValueError(
                f"{self.path} has {found} bytes, but the checkpoint was written after {offset}: it was cut or "
                f"replaced; put the file back, or start the run again"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.truncate(offset)
        self.offset = offset

    def write(self, **values: Any) -> None:
        """Adds one line; numbers that JSON has no word for (nan, inf) become null."""
        if not self.active:
            return
        plain = {key: _plain(value) for key, value in values.items()}
        self._waiting += (json.dumps(plain, ensure_ascii=False) + "\n").encode()
        try:
            self._append()
        except OSError as error:
            log.warning("%s cannot be written (%s); its lines wait in memory", self.path, error.strerror or error)

    def sync(self) -> int:
        """Everything written so far is on the disk afterwards; returns the file's length. Raises OSError."""
        if self.active:
            self._append()
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())
        return self.offset

    def _append(self) -> None:
        with open(self.path, "ab", buffering=0) as file:
            file.truncate(self.offset)  # a part that a full disk left of an earlier try
            while self._waiting:
                written = file.write(self._waiting)
                self._waiting = self._waiting[written:]
                self.offset += written


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
