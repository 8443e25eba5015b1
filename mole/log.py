"""Where mole's log goes: bare lines to stderr, everything with its time to the run's log.txt; secrets blotted out."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mole.secrets import scrub

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def start_log(level: int) -> None:
    """Sends mole's log to stderr from `level` on; a second call replaces the first."""
    logger = logging.getLogger("mole")
    for handler in [h for h in logger.handlers if isinstance(h, _Screen)]:
        logger.removeHandler(handler)
    handler = _Screen(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(_Scrubbed("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Writes mole's log to `path` too, on rank 0."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    logger = logging.getLogger("mole")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Scrubbed(_FORMAT))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class _Screen(logging.StreamHandler):
    """The handler that `start_log` puts on; a type of its own, so that it is found again."""


class _Scrubbed(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))
