"""Experts that were fetched from elsewhere, kept by their content: one copy, whatever library or name it came from.

<cache_dir>/experts/<content>/      the files, verified when they came and each time they are used
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mole.experts import folder as folders
from mole.experts.backends import Backend, LocalBackend
from mole.experts.card import Card
from mole.experts.errors import Damaged, Refused
from mole.untrusted import MAX_WEIGHTS_BYTES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What is taken from a library: `max_expert_bytes` of all files of one expert."""

    max_expert_bytes: int = MAX_WEIGHTS_BYTES


class ExpertCache:
    """Fetches experts; what does not lie in a folder of this machine already is kept in `cache_dir`."""

    def __init__(self, backend: Backend, cache_dir: Path | None, limits: Limits) -> None:
        self._backend = backend
        self._limits = limits
        is_here = isinstance(backend, LocalBackend) or backend.url.startswith("memory:")
        self._folder = None if cache_dir is None or is_here else cache_dir / "experts"

    def fetch(self, name: str, dest: Path, card: Card) -> None:
        """Put the files of that revision into the empty folder `dest`. Raises Damaged; Refused if it is too large."""
        if card.size > self._limits.max_expert_bytes:
            most = f"at most {self._limits.max_expert_bytes:,} are taken"
            raise Refused(f"{self._backend.url}/{name} has {card.size:,} bytes; {most}")
        if self._folder is None:
            self._backend.fetch(name, dest, card.revision)
            return
        kept = self._folder / card.content
        if kept.is_dir():
            try:
                folders.copy_files(kept, dest, card)
                return
            except (Damaged, OSError):
                logger.info("%s is damaged; it is fetched again", kept)
                shutil.rmtree(kept, ignore_errors=True)
                for entry in dest.iterdir():
                    entry.unlink()
        self._backend.fetch(name, dest, card.revision)
        self._keep(dest, kept, card)

    def _keep(self, folder: Path, kept: Path, card: Card) -> None:
        """Copy verified files into the cache, whole or not at all; a cache that cannot be written only costs time."""
        new = kept.with_name(f"new-{uuid.uuid4().hex}")
        try:
            new.mkdir(parents=True)
            folders.copy_files(folder, new, card)
            for path in new.iterdir():
                path.chmod(0o444)
            os.rename(new, kept)
        except OSError as error:
            if not kept.is_dir():  # if it is: another process kept the same files first
                logger.info("%s cannot be written: %s", kept, error.strerror)
        finally:
            with suppress(OSError):
                shutil.rmtree(new)
