"""A library in a blob store: S3, Azure, memory.

    cards/<name>.json   past/<name>/<revision>.json   files/<name>/<sha256>/<file>   derived/…

Files go under keys that carry their digest and are never overwritten by other bytes; the card that is going to be
replaced goes to past/; then one conditional write of the card publishes. A removed card stays as a tombstone: there is
no portable conditional delete, and an unconditional one could hit a card that was published in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from mole.experts import folder as folders
from mole.experts.backends import blob_garbage
from mole.experts.backends.backend import Change, Garbage
from mole.experts.backends.blob_store import TOMBSTONE, BlobStore, Moved, card_key, file_key, past_key
from mole.experts.backends.changes import check_changes, check_revision, note_written
from mole.experts.backends.entries import ARTEFACTS, EXPERTS, Entries
from mole.experts.card import MAX_CARD_BYTES
from mole.experts.errors import Conflict, Damaged, NoLibrary, Refused, UnknownExpert, Unreachable
from mole.registry import unknown

_AT_ONCE = 8
_TRIES = 10
_LOST = 2
_COPIES = 2


class BlobBackend:
    """The store's own conditional writes are the only lock; `store` is one of obstore's."""

    after_removal = "in the store, until mole library gc keep=0 takes them"

    def __init__(
        self, store: Any, url: str, prefix: str = "", *, entries: Entries = EXPERTS, within: BlobBackend | None = None
    ) -> None:
        self._store = store if isinstance(store, BlobStore) else BlobStore(store, url, prefix)
        self.url = url
        self._entries = entries
        self._within = within

    @property
    def derived(self) -> BlobBackend:
        store = self._store.below("derived")
        return BlobBackend(store, store.url, entries=ARTEFACTS, within=self)

    def exists(self) -> bool:
        """A library has a card, or the tombstone of one."""
        if self._within is not None:
            return self._within.exists()
        try:
            return next(self._store.rows("cards"), None) is not None
        except NoLibrary:
            return False

    def head(self) -> None:
        return None

    def cards(self) -> dict[str, str]:
        found, empty = {}, True
        for row in self._store.rows("cards"):
            empty = False
            name = row.key.removeprefix("cards/").removesuffix(".json")
            if row.size != len(TOMBSTONE) and self._entries.is_name(name) and row.key == card_key(name):
                found[name] = row.version
        if empty:
            self._must_exist()
        return dict(sorted(found.items()))

    def card(self, name: str, revision: str | None = None) -> tuple[Any, str]:
        data, version = self._current(self._entries.check_name(name))
        if revision is None:
            if data is None:
                raise UnknownExpert(f"{self.url}: {unknown(self._entries.what, name, self.cards())}")
            return self._entries.parse(data, f"{self.url}/{name}"), version or ""
        current = None if data is None else self._revision(data)
        if current is not None and data is not None and current.startswith(check_revision(revision)):
            return self._entries.parse(data, f"{self.url}/{name}"), version or ""
        return self._past_card(name, revision)

    def _past_card(self, name: str, revision: str) -> tuple[Any, str]:
        known = self._past(name)
        found = [key for key in known if key.startswith(check_revision(revision))]
        if len(found) != 1:
            self._must_exist()
            kept = sorted(key[:8] for key in known)
            what = "no" if not found else "more than one"
            raise UnknownExpert(f"{self.url}/{name}: {what} revision starts with {revision} (old ones: {kept})")
        read = self._store.read(past_key(name, found[0]), MAX_CARD_BYTES)
        if read is None:
            raise UnknownExpert(f"{self.url}/{name}: revision {revision} has just been collected")
        card = self._entries.parse(read[0], f"{self.url}/{name}@{found[0][:8]}")
        if card.revision != found[0]:
            raise Damaged(f"{self.url}/{name}@{found[0][:8]}: the card of this old revision is of another one")
        return card, read[1]

    def _past(self, name: str) -> list[str]:
        keys = (row.key.rpartition("/")[2] for row in self._store.rows(f"past/{name}"))
        return [key.removesuffix(".json") for key in keys]

    def version(self, name: str) -> str | None:
        data, version = self._current(self._entries.check_name(name))
        if data is None:
            self._must_exist()
        return None if data is None else version

    def bearers(self, revision: str) -> list[str]:
        tail = f"/{check_revision(revision)}.json"
        return sorted({row.key.split("/")[1] for row in self._store.rows("past") if row.key.endswith(tail)})

    def read_cards(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        rest = iter(names)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            while some := list(islice(rest, 8 * _AT_ONCE)):
                for name, found in zip(some, pool.map(self._card_or_error, some), strict=True):
                    if found is not None:
                        yield name, found

    def _card_or_error(self, name: str) -> Any:
        try:
            data, _ = self._current(self._entries.check_name(name))
            return None if data is None else self._entries.parse(data, f"{self.url}/{name}")
        except (Damaged, Refused) as error:
            return error

    def fetch(self, name: str, dest: Path, revision: str | None = None) -> Any:
        for copy in range(_COPIES):
            card, _ = self.card(name, revision)
            try:
                return self._fetch(name, card, dest)
            except BaseException as error:
                for entry in dest.iterdir():
                    entry.unlink()
                if not isinstance(error, Damaged) or copy == _COPIES - 1:
                    raise
        raise AssertionError

    def _fetch(self, name: str, card: Any, dest: Path) -> Any:
        for file, wanted in card.files.items():
            with (dest / file).open("xb") as writer:
                for piece in self._verified(name, file, wanted):
                    writer.write(piece)
        folders.write_card(card, dest, self._entries)
        return card

    def _verified(self, name: str, file: str, wanted: dict[str, Any]) -> Iterator[bytes]:
        """The bytes of a file in pieces. Raises Damaged, at the end at the latest, if they are not the card's."""
        place = f"{self.url}/{name}: {file}"
        try:
            pieces = self._store.stream(file_key(name, file, wanted), wanted["size"])
            if pieces is None:
                raise Damaged(f"{place} is listed in the card and missing")
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
                yield piece
        except Refused as error:
            raise Damaged(f"{place} is not what the card says: {error}") from None
        if digest.hexdigest() != wanted["sha256"]:
            raise Damaged(f"{place} is not what the card says: other content of the same size")

    def publish(self, name: str, folder: Path, expect: str | None = None) -> str:
        (version,) = self._write([Change(name, folder, expect)])
        return version

    def remove(self, name: str, expect: str) -> None:
        self._write([Change(name, None, expect)])

    def apply(self, changes: Sequence[Change], message: str, *, readme: str | None = None) -> None:
        """As the contract says; `message` and `readme` have no place here."""
        self._write(changes)

    def readme(self) -> None:
        return None

    def _write(self, changes: Sequence[Change]) -> list[str]:
        check_changes(changes, self._entries)
        cards = [None if change.folder is None else self._card_of(change.folder) for change in changes]
        if not any(cards):
            self._must_exist()
        done = [self._must_be(one, *self._current(one.name), card) for one, card in zip(changes, cards, strict=True)]
        if not all(done):
            self._store.check_conditions()
        written: list[str] = []
        versions = []
        try:
            for change, card, is_done in zip(changes, cards, done, strict=True):
                if change.folder is not None and not is_done:
                    self._put_files(change.name, change.folder, card)
                versions.append(self._swap(change, card))
                written.append(change.name)
                if change.folder is not None:
                    self._put_files(change.name, change.folder, card, only_missing=True)
        except BaseException as error:
            note_written(error, written, changes)
            raise
        return versions

    def _card_of(self, folder: Path) -> Any:
        card = folders.read_card(folder, self._entries)
        folders.check_entries(folder, card, self._entries)
        return card

    def _put_files(self, name: str, folder: Path, card: Any, *, only_missing: bool = False) -> None:
        """Write the files, there or not: it makes them young, and a collector lets them be.

        What one deleted that had looked just before is missing when the card is written, and is put again.
        """
        for file, wanted in card.files.items():
            key = file_key(name, file, wanted)
            if not only_missing or (row := self._store.head(key)) is None or row.size != wanted["size"]:
                self._store.put(key, folders.verified_chunks(folder / file, wanted), wanted["size"])

    def _swap(self, change: Change, card: Any) -> str:
        """The conditional write, again as long as what is there may be replaced. Gives the version; "" of a removal."""
        key, data = card_key(change.name), TOMBSTONE if card is None else card.to_bytes()
        for attempt in range(1, _TRIES + 1):
            there, version = self._current(change.name)
            if self._must_be(change, there, version, card):
                return "" if card is None else version or ""
            if there is not None and (revision := self._revision(there)) is not None:
                self._store.put(past_key(change.name, revision), there, len(there))
            try:
                written = self._store.replace(key, data, version)
            except Moved:
                continue
            except Unreachable:  # the reply may be lost, and the write done: look
                if attempt > _LOST:
                    raise
                continue
            return "" if card is None else written
        raise Conflict(f"{self.url}/{change.name} is written by others all the time; try again")

    def _must_be(self, change: Change, there: bytes | None, version: str | None, card: Any) -> bool:
        """Whether it is as asked for already, perhaps by ourselves, and the reply was lost. Raises Conflict."""
        revision = None if there is None else self._revision(there)
        if (there is None and card is None) or (card is not None and revision == card.revision):
            return True
        if (None if there is None else version) == change.expect:
            return False
        if there is None:
            raise Conflict(f"{self.url}/{change.name} was removed by somebody else meanwhile")
        at = f"at revision {revision[:8]}" if revision else "damaged"
        meanwhile = ", changed meanwhile" if change.expect else ""
        raise Conflict(f"{self.url}/{change.name} is there, {at}{meanwhile}", revision)

    def check_writable(self) -> None:
        """Raise NoLibrary if there is no such bucket. Whether it may be written shows when it is."""
        next(self._store.rows("cards"), None)

    def verify(self, name: str, *, quick: bool = False) -> Any:
        card, _ = self.card(name)
        for file, wanted in card.files.items():
            if not quick:
                for _ in self._verified(name, file, wanted):
                    pass
                continue
            row = self._store.head(file_key(name, file, wanted))
            if row is None or row.size != wanted["size"]:
                told = "missing" if row is None else f"{row.size:,} bytes instead of {wanted['size']:,}"
                raise Damaged(f"{self.url}/{name}: {file} is not what the card says: {told}")
        return card

    def strays(self) -> list[str]:
        self._must_exist()
        known = {"cards", "past", "files", "derived"}
        found = [entry for entry in self._store.top() if entry not in known]
        for row in self._store.rows("cards"):
            name = row.key.removeprefix("cards/").removesuffix(".json")
            if not self._entries.is_name(name) or row.key != card_key(name):
                found.append(row.key)
        return sorted(found)

    def collect(self, older_than: timedelta, keep: int, *, dry_run: bool) -> list[Garbage]:
        self._must_exist()
        return blob_garbage.collect(self._store, self._entries, older_than, keep, dry_run=dry_run)

    def _current(self, name: str) -> tuple[bytes | None, str | None]:
        """The card's bytes, None for a tombstone, and the version, None if not even that is there."""
        found = self._store.read(card_key(name), MAX_CARD_BYTES)
        if found is None:
            return None, None
        return (None if found[0] == TOMBSTONE else found[0]), found[1]

    def _revision(self, data: bytes) -> str | None:
        try:
            return self._entries.parse(data, self._entries.card_file).revision
        except Damaged:
            return None

    def _must_exist(self) -> None:
        if self._within is not None:
            return self._within._must_exist()
        if not self.exists():
            raise NoLibrary(f"no library there: {self.url} holds no card; adding an expert makes a library")
        return None
