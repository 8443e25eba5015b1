"""Cards that were read before, so that a listing costs one request, or one look at each file's dates.

    <cache_dir>/libraries/<sha256 of the address, 16 hex>/cards.json      a digest, a line end, then JSON

What is kept is exactly what a backend has checked; the file carries its own digest, and one that does not fit is
dropped whole. Two processes that write it cost each other requests, never cards.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mole.experts.backends import Backend, LocalBackend
from mole.experts.card import Card, known_card
from mole.experts.names import is_name

logger = logging.getLogger(__name__)
_FORMAT = 1


def address_of(backend: Backend) -> str:
    """The address by which a library is known from wherever one stands: that of a folder is its whole path."""
    return str(backend.root) if isinstance(backend, LocalBackend) else backend.url


def library_folder(cache_dir: Path, backend: Backend) -> Path:
    """Where the cache keeps what it knows of one library."""
    return cache_dir / "libraries" / hashlib.sha256(address_of(backend).encode()).hexdigest()[:16]


class CardCache:
    """The cards of one library, kept in memory and, with a `cache_dir`, in a file."""

    def __init__(self, backend: Backend, cache_dir: Path | None = None) -> None:
        self._backend = backend
        self._file = None if cache_dir is None else library_folder(cache_dir, backend) / "cards.json"
        self._lock = threading.Lock()
        self._loaded = False
        self._head: str | None = None
        self._rows: dict[str, tuple[str, Card]] = {}  # name → the backend's token, the card

    def names(self) -> list[str]:
        """Names of all experts; no card is read. Raises NoLibrary."""
        with self._lock:
            if self._is_current(self._backend.head()):
                return list(self._rows)
        return list(self._backend.cards())

    def read(self) -> dict[str, Card | Exception]:
        """The cards of all experts as they are now, or the Damaged that one is, in the order of names."""
        with self._lock, collecting_paused(isinstance(self._backend, LocalBackend)):
            head = self._backend.head()
            if self._is_current(head):
                return {name: card for name, (_, card) in self._rows.items()}
            tokens = self._backend.cards()
            rows = {n: row for n, token in tokens.items() if (row := self._rows.get(n)) and row[0] == token}
            found: dict[str, Card | Exception] = {name: card for name, (_, card) in rows.items()}
            damaged = False
            for name, card in self._backend.read_cards([name for name in tokens if name not in rows]):
                found[name] = card
                if isinstance(card, Card):
                    rows[name] = (tokens[name], card)
                else:
                    damaged = True
            self._keep(None if damaged else head, {name: rows[name] for name in tokens if name in rows})
            return {name: found[name] for name in tokens if name in found}

    def wrote(self, head: str, cards: Mapping[str, Card | None]) -> None:
        """Keep cards that were written as what they are at `head`, so that they need not be read again.

        The tokens are asked for, and belong to that head if it is still the newest afterwards. None: a name that is
        gone.
        """
        with self._lock:
            self._load()
            tokens = self._backend.cards()
            if self._backend.head() != head:
                return
            known = {name: row[1] for name, row in self._rows.items() if row[0] == tokens.get(name)}
            known |= {name: card for name, card in cards.items() if card is not None}
            rows = {name: (token, known[name]) for name, token in tokens.items() if name in known}
            self._keep(head if len(rows) == len(tokens) else None, rows)

    def _is_current(self, head: str | None) -> bool:
        """Whether the rows are those of this head; one with a damaged card is never believed: it may be repaired."""
        self._load()
        return head is not None and head == self._head

    def _keep(self, head: str | None, rows: dict[str, tuple[str, Card]]) -> None:
        changed = head != self._head or rows.keys() != self._rows.keys()
        changed = changed or any(rows[name][0] != self._rows[name][0] for name in rows)
        self._head, self._rows = head, rows
        if not changed or self._file is None:
            return
        value = {
            "format": _FORMAT,
            "url": address_of(self._backend),
            "head": head,
            "cards": {
                name: [token, {**vars(card), "backbone": vars(card.backbone)}] for name, (token, card) in rows.items()
            },
        }
        data = json.dumps(value, separators=(",", ":")).encode()
        _write(self._file, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)

    def _load(self) -> None:
        if self._loaded or self._file is None:
            return
        self._loaded = True
        try:
            with self._file.open("rb") as file:
                digest, data = file.readline().rstrip(b"\n"), file.read()
        except OSError:
            return
        if digest.decode("ascii", "replace") != hashlib.sha256(data).hexdigest():
            logger.info("%s is damaged and not used; the cards are read again", self._file)
            return
        with collecting_paused():
            value: dict[str, Any] = json.loads(data)
            if value.get("format") == _FORMAT and value.get("url") == address_of(self._backend):
                self._head = value["head"]
                self._rows = {n: (token, known_card(card)) for n, (token, card) in value["cards"].items() if is_name(n)}


@contextmanager
def collecting_paused(is_short: bool = True) -> Iterator[None]:
    """Python's search for cycles paused: of ten thousand cards that are made it would look at each again and again.

    Not for work over a network: that is long, and its clients leave cycles behind.
    """
    if not is_short:
        yield
        return
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _write(file: Path, data: bytes) -> None:
    """Put a file in place, whole; a cache that cannot be written only costs time."""
    new = file.with_name(f"{file.name}-{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(data)
        os.replace(new, file)
    except OSError as error:
        logger.info("%s cannot be written (%s); the next process reads the cards again", file, error.strerror)
        with suppress(OSError):
            new.unlink()
