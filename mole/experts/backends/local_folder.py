"""The folder of a library: its lock, what lies in it, what a swap left aside, and how that is repaired.

An entry is a folder `<name>` with a card; `.mole/old-<name>` is the entry that a swap has moved away and not replaced.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from mole.experts import folder as folders
from mole.experts.backends.entries import Entries
from mole.experts.card import MAX_CARD_BYTES
from mole.experts.errors import Damaged, ReadOnly
from mole.untrusted import read_file

ASIDE = ".mole"
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class LocalFolder:
    """A folder that several processes of this machine read and write."""

    def __init__(self, root: Path, url: str, entries: Entries) -> None:
        self.root = root
        self.url = url
        self.aside = root / ASIDE
        self._entries = entries
        self._locks = {os.getpid(): FileLock(str(self.aside / "lock"))}

    @property
    def _lock(self) -> FileLock:
        """This process's lock: one that a fork has inherited would be held by both, or by none."""
        process = os.getpid()
        if process not in self._locks:
            self._locks = {process: FileLock(str(self.aside / "lock"))}
        return self._locks[process]

    def places(self) -> dict[str, str]:
        """Name → path of what may be an entry's folder; what a swap left aside counts if its name is missing."""
        places = {}
        for folder, prefix in ((self.aside, "old-"), (self.root, "")):
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
                for entry in found:
                    name = entry.name.removeprefix(prefix)
                    if entry.name.startswith(prefix) and self._entries.is_name(name) and not entry.is_symlink():
                        places[name] = entry.path
        return places

    def token(self, place: str) -> str | None:
        """What changes whenever the card in a folder does; None if it has none."""
        try:
            facts = os.stat(f"{place}/{self._entries.card_file}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return f"{facts.st_ino}-{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ctime_ns}"

    def read(self, folder: str | Path) -> bytes | None:
        """The card's bytes; None if `folder` is no entry's folder of its own (a link leads out of the library)."""
        if os.path.islink(folder):
            return None
        try:
            return read_file(f"{folder}/{self._entries.card_file}", MAX_CARD_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def revision(self, data: bytes) -> str | None:
        """The revision of a card; None if the card is damaged."""
        try:
            return self._entries.parse(data, self._entries.card_file).revision
        except Damaged:
            return None

    def keep(self, name: str, folder: Path, *, damaged: bool = False) -> None:
        """Move a revision that is current no longer into the history; one that is there already was the same.

        `damaged`: its files are not what its card says, so it is no revision.
        """
        known = None if damaged else self.revision(self.read(folder) or b"")
        revision = known or f"damaged-{uuid.uuid4().hex}"
        place = self.aside / "history" / name / revision
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            place = self.aside / f"new-{uuid.uuid4().hex}"
        os.rename(folder, place)
        folders.sync(place.parent)
        if place.parent == self.aside:
            shutil.rmtree(place, ignore_errors=True)

    def _repair(self) -> None:
        for old in sorted(self.aside.glob("old-*")):
            name = old.name.removeprefix("old-")
            if (self.root / name).exists():
                self.keep(name, old)
            else:
                os.rename(old, self.root / name)
                folders.sync(self.root)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes; a swap that was cut short is repaired."""
        with self._lock:
            self._repair()
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The lock, where it can be had; a library that cannot be written is read without it."""
        locked = False
        if self.aside.is_dir():
            with suppress(OSError):
                self._lock.acquire()
                locked = True
        try:
            if locked:
                with suppress(OSError):
                    self._repair()
            yield
        finally:
            if locked:
                self._lock.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the refusal of the file system into ReadOnly."""
        try:
            yield
        except OSError as error:
            if error.errno in _UNWRITABLE:
                raise ReadOnly(f"{self.url} cannot be written: {error.strerror}") from error
            raise
