"""A library in a folder of this machine.

    <root>/<name>/…   .mole/lock   .mole/new-<uuid>/   .mole/old-<name>/   .mole/history/<name>/<revision>/
    .mole/derived/    the same again, for artefacts

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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from mole.experts import folder as folders
from mole.experts.address import library_path
from mole.experts.backends import local_garbage
from mole.experts.backends.backend import Change, Garbage
from mole.experts.backends.changes import check_changes, check_revision, note_written
from mole.experts.backends.entries import ARTEFACTS, EXPERTS, Entries
from mole.experts.card import MAX_CARD_BYTES
from mole.experts.errors import Conflict, Damaged, LibraryError, NoLibrary, ReadOnly, Refused, UnknownExpert
from mole.registry import LIBRARIES, config_dataclass, unknown
from mole.untrusted import read_file

ASIDE = ".mole"
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_COPIES = 3


class LocalBackend:
    """Only writing creates folders; the lock serves all processes of this machine, on a local file system."""

    after_removal = "in its .mole/history, until mole library gc keep=0 takes them"

    def __init__(self, path: str | Path, *, entries: Entries = EXPERTS, within: LocalBackend | None = None) -> None:
        self.root = Path(path).expanduser().absolute()
        self.url = str(path)
        self._entries = entries
        self._within = within
        self._aside = self.root / ASIDE
        self._locks = {os.getpid(): FileLock(str(self._aside / "lock"))}

    @property
    def derived(self) -> LocalBackend:
        return self._derived

    @cached_property
    def _derived(self) -> LocalBackend:
        return LocalBackend(self._aside / "derived", entries=ARTEFACTS, within=self)

    @property
    def _lock(self) -> FileLock:
        """This process's lock: one that a fork has inherited would be held by both, or by none."""
        process = os.getpid()
        if process not in self._locks:
            self._locks = {process: FileLock(str(self._aside / "lock"))}
        return self._locks[process]

    def exists(self) -> bool:
        """A library has `.mole/`, or, copied without it, at least one expert."""
        if self._within is not None:
            return self._within.exists()
        return self._aside.is_dir() or any(folders.has_card(place, self._entries) for place in self._places().values())

    def head(self) -> None:
        return None

    def cards(self) -> dict[str, str]:
        self._must_exist()
        with self._reading():  # or an expert in the middle of a swap would be missing
            found = {name: self._token(place) for name, place in sorted(self._places().items())}
        return {name: token for name, token in found.items() if token is not None}

    def _places(self) -> dict[str, Path]:
        """Name → folder of what may be an entry; what a swap left aside counts, as long as its name is missing."""
        places = {}
        for folder, prefix in ((self._aside, "old-"), (self.root, "")):
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
                for entry in found:
                    name = entry.name.removeprefix(prefix)
                    if entry.name.startswith(prefix) and self._entries.is_name(name) and not entry.is_symlink():
                        places[name] = folder / entry.name
        return places

    def _token(self, place: Path) -> str | None:
        try:
            facts = os.stat(place / self._entries.card_file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return f"{facts.st_ino}-{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ctime_ns}"

    def card(self, name: str, revision: str | None = None) -> tuple[Any, str]:
        data = self._find(self._entries.check_name(name), revision)[1]
        return self._entries.parse(data, f"{self.url}/{name}"), _version(data)

    def read_cards(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        self._must_exist()
        for name in names:
            self._entries.check_name(name)
            try:
                data = self._look(name)[1]
                if data is not None:
                    yield name, self._entries.parse(data, f"{self.url}/{name}")
            except LibraryError as error:
                yield name, error

    def fetch(self, name: str, dest: Path, revision: str | None = None) -> Any:
        for _ in range(_COPIES - 1):
            with suppress(Damaged, FileNotFoundError):  # a swap in the middle of the copy looks like damage
                return self._fetch(name, dest, revision)
        with self._reading():  # or a busy writer could starve its readers
            return self._fetch(name, dest, revision)

    def _fetch(self, name: str, dest: Path, revision: str | None) -> Any:
        home, data = self._find(self._entries.check_name(name), revision)
        card = self._entries.parse(data, f"{self.url}/{name}")
        try:
            folders.copy_files(home, dest, card, self._entries)
        except BaseException:
            for entry in dest.iterdir():
                entry.unlink()
            raise
        return card

    def publish(self, name: str, folder: Path, expect: str | None = None) -> str:
        (version,) = self._write([Change(name, folder, expect)])
        return version

    def remove(self, name: str, expect: str) -> None:
        self._write([Change(name, None, expect)])

    def apply(self, changes: Sequence[Change], message: str, *, readme: str | None = None) -> None:
        """As the contract says; all is staged first, then swapped in under one lock."""
        self._write(changes)

    def readme(self) -> None:
        return None

    def _write(self, changes: Sequence[Change]) -> list[str]:
        """Make the changes and give the versions; that of a removal is empty."""
        check_changes(changes, self._entries)
        cards = [None if change.folder is None else self._card_of(change.folder) for change in changes]
        if not any(cards):
            self._must_exist()
        stages = [self._aside / f"new-{uuid.uuid4().hex}" for _ in changes]
        with self._writing():
            self._prepare()
            try:
                with self._locked():
                    for change, card in zip(changes, cards, strict=True):
                        self._there(change, card)  # what is going to fail fails before anything is copied
                for change, card, stage in zip(changes, cards, stages, strict=True):
                    if change.folder is not None and card is not None:
                        stage.mkdir()
                        folders.copy_files(change.folder, stage, card, self._entries)
                with self._locked():
                    return self._swap_all(changes, cards, stages)
            finally:
                for stage in stages:
                    shutil.rmtree(stage, ignore_errors=True)

    def _card_of(self, folder: Path) -> Any:
        card = folders.read_card(folder, self._entries)
        folders.check_entries(folder, card, self._entries)
        return card

    def _swap_all(self, changes: Sequence[Change], cards: Sequence[Any], stages: Sequence[Path]) -> list[str]:
        there = [self._there(change, card) for change, card in zip(changes, cards, strict=True)]
        written: list[str] = []
        versions = []
        try:
            for change, card, stage, data in zip(changes, cards, stages, there, strict=True):
                versions.append(self._swap(change.name, stage, card, data))
                written.append(change.name)
        except BaseException as error:
            note_written(error, written, changes)
            raise
        return versions

    def _there(self, change: Change, card: Any) -> bytes | None:
        """The bytes of the card that is there. Raises Conflict, or Refused if a foreign folder has the name."""
        home = self.root / change.name
        there = self._read(home)
        wanted = None if card is None else card.revision
        if (there is None and card is None) or (there is not None and self._revision(there) == wanted):
            return there  # the state asked for
        self._must_be(change.name, there, change.expect)
        if there is None and home.exists():
            raise Refused(f"{home} is there and no {self._entries.what}; move it away")
        return there

    def _swap(self, name: str, stage: Path, card: Any, there: bytes | None) -> str:
        home, old = self.root / name, self._aside / f"old-{name}"
        if card is None:
            if there is not None:
                self._keep(name, home)
                folders.sync(self.root)
            return ""
        if there is not None and self._revision(there) == card.revision:
            return _version(there)
        if there is not None:
            os.rename(home, old)
        os.rename(stage, home)
        folders.sync(self.root)
        if there is not None:
            self._keep(name, old)
        return _version(card.to_bytes())

    def verify(self, name: str, *, quick: bool = False) -> Any:
        for _ in range(_COPIES - 1):
            with suppress(Damaged, FileNotFoundError):
                return self._verify(name, quick)
        with self._reading():
            return self._verify(name, quick)

    def _verify(self, name: str, quick: bool) -> Any:
        home, data = self._find(self._entries.check_name(name), None)
        card = self._entries.parse(data, f"{self.url}/{name}")
        folders.check_entries(home, card, self._entries)
        folders.check_sizes(home, card)
        if not quick:
            folders.check_content(home, card)
        return card

    def strays(self) -> list[str]:
        self._must_exist()
        with self._reading(), suppress(FileNotFoundError):
            return sorted(
                entry.name
                for entry in self.root.iterdir()
                if entry.name != ASIDE and (not self._entries.is_name(entry.name) or self._read(entry) is None)
            )
        return []

    def collect(self, older_than: timedelta, keep: int, *, dry_run: bool) -> list[Garbage]:
        self._must_exist()
        if not self._aside.is_dir():
            return []
        if dry_run:
            with self._reading():
                return [row for _, row in local_garbage.garbage(self._aside, older_than, keep)]
        with self._writing():
            with self._locked():
                found = list(local_garbage.garbage(self._aside, older_than, keep))
                dead = local_garbage.moved_away([path for path, _ in found], self._aside)
            for path in dead:
                shutil.rmtree(path)
        return [row for _, row in found]

    def _find(self, name: str, revision: str | None) -> tuple[Path, bytes]:
        """The folder and the card's bytes of an expert, or of the one old revision that starts with `revision`."""
        self._must_exist()
        home, data = self._look(name)
        if revision is None:
            if data is None:
                raise UnknownExpert(f"{self.url}: {unknown(self._entries.what, name, self.cards())}")
            return home, data
        history = self._aside / "history" / name
        found = {path.name: path for path in history.glob(f"{check_revision(revision)}*")}
        current = None if data is None else self._revision(data)
        if current is not None and current.startswith(revision):
            found[current] = home
        if len(found) != 1:
            kept = sorted(path.name[:8] for path in history.glob("*"))
            what = "no" if not found else "more than one"
            raise UnknownExpert(f"{self.url}/{name}: {what} revision starts with {revision} (old ones: {kept})")
        (home,) = found.values()
        old = self._read(home)
        if old is None:
            raise Damaged(f"{home}: the card of this old revision is missing")
        return home, old

    def _look(self, name: str) -> tuple[Path, bytes | None]:
        """Folder and card's bytes; absence is believed only under the lock: it may be the middle of a swap."""
        home = self.root / name
        data = self._read(home)
        if data is None:
            with self._reading():
                data = self._read(home)
                if data is None:  # a swap cut short, on a medium that cannot be repaired
                    old = self._aside / f"old-{name}"
                    data = self._read(old)
                    home = home if data is None else old
        return home, data

    def _must_exist(self) -> None:
        if self.exists():
            return
        if self._within is not None:
            self._within._must_exist()
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
        revision = self._revision(there)
        at = f"at revision {revision[:8]}" if revision else "damaged"
        raise Conflict(f"{self.url}/{name} is there, {at}" + (", changed meanwhile" if expect else ""), revision)

    def check_writable(self) -> None:
        """Raise NoLibrary or ReadOnly if an expert could not be published here. Writes nothing."""
        if self._within is not None:
            self._within.check_writable()
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
        revision = self._revision(self._read(folder) or b"") or f"damaged-{uuid.uuid4().hex}"
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

    def _read(self, folder: Path) -> bytes | None:
        """The card's bytes; None if `folder` is no entry's folder of its own (a link leads out of the library)."""
        if folder.is_symlink():
            return None
        try:
            return read_file(folder / self._entries.card_file, MAX_CARD_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _revision(self, data: bytes) -> str | None:
        """The revision of a card; None if the card is damaged."""
        try:
            return self._entries.parse(data, self._entries.card_file).revision
        except Damaged:
            return None

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


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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
