"""A library in a folder of this machine.

    <root>/<name>/…   .mole/lock   .mole/new-<uuid>/   .mole/old-<name>/   .mole/history/<name>/<revision>/

The new folder is staged in `new-<uuid>` and swapped in under the lock: `<name>` → `old-<name>`, stage → `<name>`,
`old-<name>` → history. Whoever takes the lock next repairs a swap that was cut short. For an instant within a swap the
name does not exist: a reader believes that something is absent only after a look under the lock.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock

from mole.experts import folder as folders
from mole.experts.address import library_path
from mole.experts.card import MAX_CARD_BYTES, Card, parse_card
from mole.experts.errors import Conflict, Damaged, LibraryError, NoLibrary, ReadOnly, Refused, UnknownExpert
from mole.experts.names import check_name, is_name
from mole.experts.schema import CARD_FILE
from mole.registry import LIBRARIES, config_dataclass, unknown
from mole.untrusted import read_file, shown

ASIDE = ".mole"
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_COPIES = 3


class LocalBackend:
    """Only writing creates folders; the lock serves all processes of this machine, on a local file system."""

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path).expanduser().absolute()
        self.url = str(path)
        self._aside = self.root / ASIDE
        self._locks = {os.getpid(): FileLock(str(self._aside / "lock"))}

    @property
    def _lock(self) -> FileLock:
        """This process's lock: one that a fork has inherited would be held by both, or by none."""
        process = os.getpid()
        if process not in self._locks:
            self._locks = {process: FileLock(str(self._aside / "lock"))}
        return self._locks[process]

    def exists(self) -> bool:
        """A library has `.mole/`, or, copied without it, at least one expert."""
        if self._aside.is_dir():
            return True
        return self.root.is_dir() and any(
            folders.has_card(entry) for entry in self.root.iterdir() if is_name(entry.name)
        )

    def cards(self) -> dict[str, str]:
        self._must_exist()
        with self._reading():  # or an expert in the middle of a swap would be missing
            names = sorted(entry.name for entry in os.scandir(self.root) if is_name(entry.name))
        return {name: _version(data) for name in names if (data := self._look(name)) is not None}

    def card(self, name: str, revision: str | None = None) -> tuple[Card, str]:
        data = self._find(check_name(name), revision)[1]
        return parse_card(data, f"{self.url}/{name}"), _version(data)

    def fetch(self, name: str, dest: Path, revision: str | None = None) -> Card:
        for _ in range(_COPIES - 1):
            with suppress(Damaged, FileNotFoundError):  # a swap in the middle of the copy looks like damage
                return self._fetch(name, dest, revision)
        with self._reading():  # or a busy writer could starve its readers
            return self._fetch(name, dest, revision)

    def _fetch(self, name: str, dest: Path, revision: str | None) -> Card:
        home, data = self._find(check_name(name), revision)
        card = parse_card(data, f"{self.url}/{name}")
        try:
            folders.copy_files(home, dest, card)
        except BaseException:
            for entry in dest.iterdir():
                entry.unlink()
            raise
        return card

    def publish(self, name: str, folder: Path, expect: str | None = None) -> str:
        check_name(name)
        card = folders.read_card(folder)
        folders.check_entries(folder, card)
        stage = self._aside / f"new-{uuid.uuid4().hex}"
        with self._writing():
            self._prepare()
            try:
                stage.mkdir()
                folders.copy_files(folder, stage, card)
                with self._locked():
                    return self._swap(name, stage, card, expect)
            finally:
                shutil.rmtree(stage, ignore_errors=True)

    def _swap(self, name: str, stage: Path, card: Card, expect: str | None) -> str:
        home, old = self.root / name, self._aside / f"old-{name}"
        there = _read(home)
        if there is not None and _revision(there) == card.revision:
            return _version(there)
        self._must_be(name, there, expect)
        if there is not None:
            os.rename(home, old)
        elif home.exists():
            raise Refused(f"{home} is there and no expert; move it away")
        os.rename(stage, home)
        folders.sync(self.root)
        if there is not None:
            self._keep(name, old)
        return _version(card.to_bytes())

    def remove(self, name: str, expect: str) -> None:
        self._must_exist()
        with self._writing(), self._locked():
            there = _read(self.root / check_name(name))
            if there is None:
                return
            self._must_be(name, there, expect)
            self._keep(name, self.root / name)
            folders.sync(self.root)

    def verify(self, name: str, *, quick: bool = False) -> Card:
        for _ in range(_COPIES - 1):
            with suppress(Damaged, FileNotFoundError):
                return self._verify(name, quick)
        with self._reading():
            return self._verify(name, quick)

    def _verify(self, name: str, quick: bool) -> Card:
        home, data = self._find(check_name(name), None)
        card = parse_card(data, f"{self.url}/{name}")
        folders.check_entries(home, card)
        folders.check_sizes(home, card)
        if not quick:
            folders.check_content(home, card)
        return card

    def strays(self) -> list[str]:
        self._must_exist()
        with self._reading():
            return sorted(
                entry.name
                for entry in self.root.iterdir()
                if entry.name != ASIDE and (not is_name(entry.name) or _read(entry) is None)
            )

    def _find(self, name: str, revision: str | None) -> tuple[Path, bytes]:
        """The folder and the card's bytes of an expert, or of the one old revision that starts with `revision`."""
        self._must_exist()
        home = self.root / name
        data = self._look(name)
        if data is None and (self._aside / f"old-{name}").is_dir():  # cut short, on a medium that cannot be repaired
            home = self._aside / f"old-{name}"
            data = _read(home)
        if revision is None:
            if data is None:
                raise UnknownExpert(f"{self.url}: {unknown('expert', name, self.cards())}")
            return home, data
        found = {path.name: path for path in (self._aside / "history" / name).glob(f"{_hex(revision)}*")}
        if data is not None and (current := parse_card(data, f"{self.url}/{name}")).revision.startswith(revision):
            found[current.revision] = home
        if len(found) != 1:
            kept = sorted(path.name[:8] for path in (self._aside / "history" / name).glob("*"))
            what = "no" if not found else "more than one"
            raise UnknownExpert(f"{self.url}/{name}: {what} revision starts with {revision} (old ones: {kept})")
        (home,) = found.values()
        old = _read(home)
        if old is None:
            raise Damaged(f"{home}: the card of this old revision is missing")
        return home, old

    def _look(self, name: str) -> bytes | None:
        """The card's bytes; absence is believed only under the lock: it may be the middle of a swap."""
        data = _read(self.root / name)
        if data is None:
            with self._reading():
                data = _read(self.root / name)
        return data

    def _must_exist(self) -> None:
        if self.exists():
            return
        if folders.has_card(self.root):
            raise NoLibrary(f"{self.url} is an expert's folder; its library may be {self.root.parent}")
        what = "is there and no library" if self.root.exists() else "does not exist"
        raise NoLibrary(f"no library there: {self.url} {what}; mole library add <library> <expert folder> makes one")

    def _must_be(self, name: str, there: bytes | None, expect: str | None) -> None:
        """Raise Conflict unless what is there is at version `expect`; damaged cards count as any other version."""
        if (None if there is None else _version(there)) == expect:
            return
        if there is None:
            raise Conflict(f"{self.url}/{name} was removed by somebody else meanwhile")
        revision = _revision(there)
        at = f"at revision {revision[:8]}" if revision else "damaged"
        raise Conflict(f"{self.url}/{name} is there, {at}" + (", changed meanwhile" if expect else ""), revision)

    def check_writable(self) -> None:
        """Raise NoLibrary or ReadOnly if an expert could not be published here. Writes nothing."""
        if self.root.exists() and not self.root.is_dir():
            raise NoLibrary(f"{self.url} is a file, not a folder")
        if self.root.is_dir() and any(self.root.iterdir()) and not self.exists():
            raise NoLibrary(f"{self.url} is not empty and no library; choose a new or an empty folder for one")
        place = next(p for p in (self._aside, self.root, *self.root.absolute().parents) if p.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise ReadOnly(f"{self.url} cannot be written: {place} is no folder, or not yours to write; choose another")

    def _prepare(self) -> None:
        if not self._aside.is_dir():
            self.check_writable()
            self._aside.mkdir(parents=True, exist_ok=True)

    def _keep(self, name: str, folder: Path) -> None:
        """Move a revision that is current no longer into the history; one that is there already was the same."""
        revision = _revision(_read(folder) or b"") or f"damaged-{uuid.uuid4().hex}"
        place = self._aside / "history" / name / revision
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            place = self._aside / f"new-{uuid.uuid4().hex}"
        os.rename(folder, place)
        folders.sync(place.parent)
        if place.parent == self._aside:
            shutil.rmtree(place, ignore_errors=True)

    def _repair(self) -> None:
        for old in sorted(self._aside.glob("old-*")):
            name = old.name.removeprefix("old-")
            if (self.root / name).exists():
                self._keep(name, old)
            else:
                os.rename(old, self.root / name)
                folders.sync(self.root)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._repair()
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """The lock, where it can be had; a library that cannot be written is read without it."""
        locked = False
        if self._aside.is_dir():
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
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _UNWRITABLE:
                raise ReadOnly(f"{self.url} cannot be written: {error.strerror}") from error
            raise


def _read(folder: Path) -> bytes | None:
    """The card's bytes; None if `folder` is no expert's folder of its own (a link leads out of the library)."""
    if folder.is_symlink():
        return None
    try:
        return read_file(folder / CARD_FILE, MAX_CARD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _revision(data: bytes) -> str | None:
    """The revision of a card; None if the card is damaged."""
    try:
        return parse_card(data, CARD_FILE).revision
    except Damaged:
        return None


def _hex(revision: str) -> str:
    if not (8 <= len(revision) <= 64 and set(revision) <= set("0123456789abcdef")):
        raise LibraryError(f"revision {shown(revision)}: 8 to 64 small hexadecimal digits are wanted")
    return revision


@config_dataclass
class LocalConfig:
    """A library in a folder."""

    name: Literal["local"] = "local"
    url: str = "outputs/library"

    def __post_init__(self) -> None:
        library_path(self.url)


@LIBRARIES.register("local", LocalConfig)
def local_library(config: LocalConfig) -> LocalBackend:
    """The backend of a library in a folder."""
    return LocalBackend(library_path(config.url))
