"""A library in a folder of this machine.

    <root>/<name>/…   .mole/lock   .mole/new-<uuid>/   .mole/old-<name>/   .mole/history/<name>/<revision>/
    .mole/derived/    the same again, for artefacts

The new folder is staged in `new-<uuid>` and swapped in under the lock: `<name>` → `old-<name>`, stage → `<name>`,
`old-<name>` → history. Whoever takes the lock next repairs a swap that was cut short. For an instant within a swap the
name does not exist: a reader believes that something is absent only after a look under the lock.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mole.experts import folder as folders
from mole.experts.address import library_path
from mole.experts.backends import local_garbage
from mole.experts.backends.backend import Change, Garbage
from mole.experts.backends.changes import check_changes, check_revision, note_written
from mole.experts.backends.entries import ARTEFACTS, EXPERTS, Entries
from mole.experts.backends.local_folder import ASIDE, LocalFolder
from mole.experts.errors import Conflict, Damaged, LibraryError, NoLibrary, ReadOnly, Refused, UnknownExpert
from mole.experts.schema import README_FILE
from mole.registry import LIBRARIES, config_dataclass, unknown

_COPIES = 3


class LocalBackend:
    """Only writing creates folders; the lock serves all processes of this machine, on a local file system."""

    after_removal = "in its .mole/history, until mole library gc keep=0 takes them"

    def __init__(self, path: str | Path, *, entries: Entries = EXPERTS, within: LocalBackend | None = None) -> None:
        self.root = Path(path).expanduser().absolute()
        self.url = str(path)
        self._entries = entries
        self._within = within
        self._folder = LocalFolder(self.root, self.url, entries)
        self._aside = self._folder.aside

    @property
    def derived(self) -> LocalBackend:
        return self._derived

    @cached_property
    def _derived(self) -> LocalBackend:
        return LocalBackend(self._aside / "derived", entries=ARTEFACTS, within=self)

    def exists(self) -> bool:
        """A library has `.mole/`, or, copied without it, at least one expert."""
        if self._within is not None:
            return self._within.exists()
        return self._aside.is_dir() or any(
            folders.has_card(place, self._entries) for place in self._folder.places().values()
        )

    def head(self) -> None:
        return None

    def cards(self) -> dict[str, str]:
        self._must_exist()
        with self._folder.reading():  # or an expert in the middle of a swap would be missing
            found = {name: self._folder.token(place) for name, place in sorted(self._folder.places().items())}
        return {name: token for name, token in found.items() if token is not None}

    def card(self, name: str, revision: str | None = None) -> tuple[Any, str]:
        data = self._find(self._entries.check_name(name), revision)[1]
        return self._entries.parse(data, f"{self.url}/{name}"), _version(data)

    def version(self, name: str) -> str | None:
        self._must_exist()
        data = self._look(self._entries.check_name(name))[1]
        return None if data is None else _version(data)

    def bearers(self, revision: str) -> list[str]:
        return sorted(path.parent.name for path in (self._aside / "history").glob(f"*/{check_revision(revision)}"))

    def read_cards(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        self._must_exist()
        for name in names:
            self._entries.check_name(name)
            try:
                data = self._folder.read(f"{self.root}/{name}") or self._look(name)[1]
                if data is not None:
                    yield name, self._entries.parse(data, f"{self.url}/{name}")
            except LibraryError as error:
                yield name, error

    def fetch(self, name: str, dest: Path, revision: str | None = None) -> Any:
        for _ in range(_COPIES - 1):
            with suppress(Damaged, FileNotFoundError):  # a swap in the middle of the copy looks like damage
                return self._fetch(name, dest, revision)
        with self._folder.reading():  # or a busy writer could starve its readers
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
        with self._folder.writing():
            self._prepare()
            try:
                with self._folder.locked():
                    for change, card in zip(changes, cards, strict=True):
                        self._there(change, card)  # what is going to fail fails before anything is copied
                for change, card, stage in zip(changes, cards, stages, strict=True):
                    if change.folder is not None and card is not None:
                        stage.mkdir()
                        folders.copy_files(change.folder, stage, card, self._entries)
                with self._folder.locked():
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
        there = self._folder.read(home)
        wanted = None if card is None else card.revision
        if (there is None and card is None) or (there is not None and self._folder.revision(there) == wanted):
            return there  # the state asked for
        self._must_be(change.name, there, change.expect)
        if there is None and home.exists():
            raise Refused(f"{home} is there and no {self._entries.what}; move it away")
        return there

    def _swap(self, name: str, stage: Path, card: Any, there: bytes | None) -> str:
        home, old = self.root / name, self._aside / f"old-{name}"
        if card is None:
            if there is not None:
                self._folder.keep(name, home)
                folders.sync(self.root)
            return ""
        same = there is not None and self._folder.revision(there) == card.revision
        if same and self._is_sound(home, card):
            return _version(card.to_bytes())
        if there is not None:
            os.rename(home, old)
        os.rename(stage, home)
        folders.sync(self.root)
        if there is not None:
            self._folder.keep(name, old, damaged=same)
        return _version(card.to_bytes())

    def _is_sound(self, home: Path, card: Any) -> bool:
        try:
            folders.check_entries(home, card, self._entries)
            folders.check_sizes(home, card)
            folders.check_content(home, card)
        except (Damaged, Refused, OSError):
            return False
        return True

    def verify(self, name: str, *, quick: bool = False) -> Any:
        for _ in range(_COPIES - 1):
            with suppress(Damaged, FileNotFoundError):
                return self._verify(name, quick)
        with self._folder.reading():
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
        with self._folder.reading(), suppress(FileNotFoundError):
            return sorted(
                entry.name
                for entry in self.root.iterdir()
                if entry.name not in (ASIDE, README_FILE)
                and (not self._entries.is_name(entry.name) or self._folder.read(entry) is None)
            )
        return []

    def collect(self, older_than: timedelta, keep: int, *, dry_run: bool) -> list[Garbage]:
        self._must_exist()
        if not self._aside.is_dir():
            return []
        if dry_run:
            with self._folder.reading():
                return [row for _, row in local_garbage.garbage(self._aside, older_than, keep)]
        with self._folder.writing():
            with self._folder.locked():
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
        current = None if data is None else self._folder.revision(data)
        if current is not None and current.startswith(revision):
            found[current] = home
        if len(found) != 1:
            kept = sorted(path.name[:8] for path in history.glob("*"))
            what = "no" if not found else "more than one"
            raise UnknownExpert(f"{self.url}/{name}: {what} revision starts with {revision} (old ones: {kept})")
        (home,) = found.values()
        old = self._folder.read(home)
        if old is None:
            raise Damaged(f"{home}: the card of this old revision is missing")
        return home, old

    def _look(self, name: str) -> tuple[Path, bytes | None]:
        """Folder and card's bytes; absence is believed only under the lock: it may be the middle of a swap."""
        home = self.root / name
        data = self._folder.read(home)
        if data is None:
            with self._folder.reading():
                data = self._folder.read(home)
                if data is None:  # a swap cut short, on a medium that cannot be repaired
                    old = self._aside / f"old-{name}"
                    data = self._folder.read(old)
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
        revision = self._folder.revision(there)
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
