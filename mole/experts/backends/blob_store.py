"""A blob store, reduced to what a library needs: keys with bytes and ETags, and a write that says what it replaces.

The one file that knows obstore, and its errors: what a store's client says may hold signed addresses, so only its first
line goes on, without queries.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mole.experts.errors import LibraryError, NoLibrary, ReadOnly, Refused, Unreachable
from mole.secrets import scrub
from mole.untrusted import shown

TOMBSTONE = b'{"removed": true}'  # shorter than any card, so that the sizes in a listing tell them apart

_CHUNK = 1 << 20
_WHOLE = 8 << 20  # what is not larger is sent in one request, and is in memory once
_QUERY = re.compile(r"\?[^\s\"']*")
_STATUS = re.compile(r"status code: (\d{3})(?: [A-Z][A-Za-z]*)*")
_CODE = re.compile(r"<Code>([A-Za-z]{1,60})</Code>")


class Moved(Exception):
    """The key is not at the version that was to be replaced."""


@dataclass(frozen=True)
class Row:
    """One key of a listing."""

    key: str
    size: int
    version: str
    modified: datetime


class BlobStore:
    """Keys below a prefix of a store of obstore's. Raises Unreachable, ReadOnly, NoLibrary (no such bucket)."""

    def __init__(self, store: Any, url: str, prefix: str = "", *, obeys: threading.Event | None = None) -> None:
        self._store = store
        self.url = url
        self._prefix = f"{prefix}/" if prefix else ""
        self._obeys = obeys or threading.Event()  # set once the store has shown that it obeys conditions

    def below(self, folder: str) -> BlobStore:
        """The keys in a folder of this store."""
        url = f"{self.url.rstrip('/')}/{folder}"
        return BlobStore(self._store, url, f"{self._prefix}{folder}", obeys=self._obeys)

    def read(self, key: str, most: int) -> tuple[bytes, str] | None:
        """The bytes of a key, at most `most`, and its version; None if there is none. Raises Refused if it has more."""
        chunks, version, _ = self._get(key, most)
        return None if chunks is None else (b"".join(chunks), version)

    def stream(self, key: str, size: int) -> Iterator[bytes] | None:
        """The bytes of a key in pieces; None if it is not there. Raises Refused as soon as they are not `size`."""
        chunks, _, found = self._get(key, size)
        if chunks is not None and found != size:
            raise Refused(f"{self.url}/{key}: {found:,} bytes instead of {size:,}")
        return chunks

    def _get(self, key: str, most: int) -> tuple[Iterator[bytes] | None, str, int]:
        import obstore

        with self._answering():
            try:
                found = obstore.get(self._store, self._prefix + key)
            except FileNotFoundError:
                return None, "", 0
            size, version = found.meta["size"], self._version(found.meta["e_tag"])
        if size > most:
            raise Refused(f"{self.url}/{key}: {size:,} bytes; at most {most:,} are taken")
        return self._pieces(found, key, most), version, size

    def _pieces(self, found: Any, key: str, most: int) -> Iterator[bytes]:
        size = 0
        with self._answering():
            for piece in found.stream(min_chunk_size=_CHUNK):
                size += len(piece)
                if size > most:
                    raise Refused(f"{self.url}/{key}: more than {most:,} bytes come")
                yield bytes(piece)

    def head(self, key: str) -> Row | None:
        """Size, version and age of a key; None if there is none."""
        import obstore

        with self._answering():
            try:
                return self._row(obstore.head(self._store, self._prefix + key))
            except FileNotFoundError:
                return None

    def rows(self, folder: str) -> Iterator[Row]:
        """Every key below a folder, in the order of the store."""
        import obstore

        with self._answering():
            try:
                for page in obstore.list(self._store, prefix=self._prefix + folder, chunk_size=1000):
                    yield from (self._row(found) for found in page)
            except FileNotFoundError:
                raise self._no_bucket() from None

    def top(self) -> list[str]:
        """The names of folders and keys right below the prefix."""
        import obstore

        with self._answering():
            try:
                found = obstore.list_with_delimiter(self._store, prefix=self._prefix or None)
            except FileNotFoundError:
                raise self._no_bucket() from None
        paths = [*found["common_prefixes"], *(row["path"] for row in found["objects"])]
        return sorted(path.removeprefix(self._prefix).strip("/") for path in paths)

    def put(self, key: str, data: bytes | Iterable[bytes], size: int) -> None:
        """Write a key whatever was there. What an iterable raises goes on, and nothing is written."""
        import obstore

        whole = size <= _WHOLE or isinstance(data, bytes)
        body: Any = data if isinstance(data, bytes) else b"".join(data) if whole else data
        with self._answering(writing=True):
            obstore.put(self._store, self._prefix + key, body, use_multipart=not whole, max_concurrency=4)

    def replace(self, key: str, data: bytes, version: str | None) -> str:
        """Write a key that is at `version` (None: that is not there). Gives the new version. Raises Moved."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create" if version is None else {"e_tag": version}
        with self._answering(writing=True):
            try:
                return self._version(obstore.put(self._store, self._prefix + key, data, mode=mode)["e_tag"])
            except (AlreadyExistsError, PreconditionError):
                raise Moved(key) from None
            except FileNotFoundError:
                if version is None:
                    raise self._no_bucket() from None
                raise Moved(key) from None

    def delete(self, key: str) -> None:
        """Take a key away; that it is not there is no error."""
        import obstore

        with self._answering(writing=True):
            try:
                obstore.delete(self._store, self._prefix + key)
            except FileNotFoundError:
                return

    def now(self) -> datetime:
        """The store's own time, to the second: this machine's clock may be wrong, and files would seem old or young."""
        key = self._probe()
        self.put(key, b"", 0)
        row = self.head(key)
        self.delete(key)
        return row.modified if row is not None else datetime.now(UTC)

    def check_conditions(self) -> None:
        """Raise Refused unless the store obeys the conditions of a write. It is asked once for each object."""
        if self._obeys.is_set():
            return
        key = self._probe()
        try:
            first = self._surely(key, b"1", None)
            self._must_refuse(key, None)
            self._surely(key, b"2", first)
            self._must_refuse(key, first)
        except Moved:
            raise Refused(f"{self.url} does not take the ETag that it gave: nothing could be replaced safely") from None
        finally:
            self.delete(key)
        self._obeys.set()

    def _surely(self, key: str, data: bytes, version: str | None) -> str:
        """As `replace`; when the client has asked again because a reply was lost, it has met its own write."""
        try:
            return self.replace(key, data, version)
        except Moved:
            found = self.read(key, len(data))
            if found is None or found[0] != data:
                raise
            return found[1]

    def _must_refuse(self, key: str, version: str | None) -> None:
        try:
            self.replace(key, b"3", version)
        except Moved:
            return
        what = "a key that is there was created again" if version is None else "a stale ETag was accepted"
        raise Refused(f"{self.url} ignores conditions ({what}): two writers would lose each other's work")

    def _probe(self) -> str:
        return f"probe-{uuid.uuid4().hex}"

    def _row(self, found: Any) -> Row:
        key = found["path"].removeprefix(self._prefix)
        return Row(key, found["size"], self._version(found["e_tag"]), found["last_modified"])

    def _version(self, tag: str | None) -> str:
        """An ETag in one form: Azure puts it into quotes in a header, and not in a listing."""
        if not tag:
            raise Refused(f"{self.url} gives no ETags: a change could not be seen")
        return tag if tag.startswith("W/") else f'"{tag.strip(chr(34))}"'

    def _no_bucket(self) -> NoLibrary:
        return NoLibrary(f"no library there: {self.url}: the bucket or container does not exist; make it first")

    @contextmanager
    def _answering(self, writing: bool = False) -> Iterator[None]:
        """Turn what the store's client raises into errors that hold no secret."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, ValueError) as error:
            if isinstance(error, LibraryError) or type(error).__name__ in ("AlreadyExistsError", "PreconditionError"):
                raise
            status, text = _told(error)
            if status == 404:
                raise self._no_bucket() from None
            if status in (401, 403):
                what = "written" if writing else "read"
                kind = ReadOnly if writing else Unreachable
                raise kind(f"{self.url} cannot be {what} with these credentials: {text}") from None
            raise Unreachable(f"{self.url} does not answer as it should: {text}") from None


def _told(error: BaseException) -> tuple[int, str]:
    """The status that a store replied with (0: none), and what happened, without queries: they may be signed.

    What the store's reply said is not passed on, but for its word for the error, such as SlowDown.
    """
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    line = _QUERY.sub("?…", (text[: status.end()] if status else text).strip().partition("\n")[0])
    line = f"{line} ({code[1]})" if code else line
    return int(status[1]) if status else 0, shown(scrub(line or type(error).__name__), 400)[1:-1]


def card_key(name: str) -> str:
    """Where the current card of a name lies."""
    return f"cards/{name}.json"


def past_key(name: str, revision: str) -> str:
    """Where the card of an old revision lies."""
    return f"past/{name}/{revision}.json"


def file_key(name: str, file: str, wanted: dict[str, Any]) -> str:
    """Where a file of a card lies: under its digest, `wanted` being what the card says of it."""
    return f"files/{name}/{wanted['sha256']}/{file}"
