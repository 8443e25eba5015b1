"""What a library in a blob store needs no more: old revisions beyond those to keep, files that no card names.

So that a collector and a publisher do not cross: the files are listed first and the cards read after, so a file of a
card that comes meanwhile is not on the list, or young, as a publisher writes its files anew each time, there or not.
Right before a file is deleted it is asked for its age again; and a publisher looks after its card is written whether
its files are there, and puts what is missing. What remains is a publisher that begins and ends, with an old file, in
the instant between that question and the deletion. Old cards go before their files, so that no card names a file that
has gone. Tombstones stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from mole.experts.backends.backend import Garbage
from mole.experts.backends.blob_store import TOMBSTONE, BlobStore, Row, file_key
from mole.experts.backends.entries import Entries
from mole.experts.card import MAX_CARD_BYTES
from mole.experts.errors import Damaged, Refused

LEAST_AGE = timedelta(hours=1)  # of a file that no card names: its publisher may still be at work

_AT_ONCE = 8


def collect(store: BlobStore, entries: Entries, older_than: timedelta, keep: int, *, dry_run: bool) -> list[Garbage]:
    """Take away what nothing needs, or only tell of it."""
    # The store's time decides. A dry run writes nothing, so it has only this machine's clock to go by.
    now = datetime.now(UTC) if dry_run else store.now()
    found: list[Garbage] = []

    def goes(row: Row, before: datetime, why: str) -> bool:
        """Whether a key is as old as it has to be, just before it goes."""
        if row.modified > before:
            return False
        if not dry_run:
            again = store.head(row.key)
            if again is None or again.modified > before:
                return False
            store.delete(row.key)
        found.append(Garbage(row.key, why, row.size))
        return True

    files = list(store.rows("files"))
    needed = _Needed(store, entries)
    needed.add(store.rows("cards"))
    before = now - older_than
    old: list[Row] = []
    for row, wanted in _past(store, needed, keep):
        why = f"an old revision, there since {row.modified:%Y-%m-%d}"
        if wanted or not goes(row, before, why):
            old.append(row)
    needed.add(old)
    before = now - max(older_than, LEAST_AGE)
    for row in files:
        if not needed(row):
            goes(row, before, "no card names it")
    for key in store.top():
        if key.startswith("probe-") and (row := store.head(key)) is not None:
            goes(row, before, "left by a writer that was cut short")
    return found


def _past(store: BlobStore, needed: _Needed, keep: int) -> Iterator[tuple[Row, bool]]:
    """Every old card, and whether it is one of the newest of its name: as the current card tells, else by its age."""
    names: dict[str, list[Row]] = defaultdict(list)
    for row in store.rows("past"):
        names[row.key.split("/")[1]].append(row)
    for name, rows in names.items():
        rows.sort(key=lambda row: (row.modified, row.key), reverse=True)
        places = needed.histories.get(name, {})
        rows.sort(key=lambda row: places.get(row.key.split("/")[2].removesuffix(".json"), len(places)))
        yield from ((row, place < keep) for place, row in enumerate(rows))


class _Needed:
    """The files that cards name; of a card that cannot be read, all files of its name."""

    def __init__(self, store: BlobStore, entries: Entries) -> None:
        self._store, self._entries = store, entries
        self._files: set[str] = set()
        self._names: set[str] = set()
        self.histories: dict[str, dict[str, int]] = {}  # name → old revision → its place, the newest first

    def __call__(self, row: Row) -> bool:
        return row.key in self._files or row.key.split("/")[1] in self._names

    def add(self, cards: Iterable[Row]) -> None:
        """Read the cards under these keys: `cards/<name>.json` or `past/<name>/…`."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            rows = list(cards)
            for row, data in zip(rows, pool.map(self._read, rows), strict=True):
                name = row.key.split("/")[1].removesuffix(".json" if row.key.startswith("cards/") else "")
                if data is not None:
                    self._name(name, data)

    def _read(self, row: Row) -> bytes | None:
        try:
            found = self._store.read(row.key, MAX_CARD_BYTES)
        except Refused:
            return b""  # too large for a card
        return None if found is None else found[0]

    def _name(self, name: str, data: bytes) -> None:
        if data == TOMBSTONE:
            return
        try:
            card = self._entries.parse(data, name)
        except Damaged:
            self._names.add(name)
            return
        history = getattr(card, "history", ())
        self.histories.setdefault(name, {row["revision"]: place for place, row in enumerate(history)})
        self._files |= {file_key(name, file, wanted) for file, wanted in card.files.items()}
