"""What a repository on the Hub holds: its head, rows, history and files; all of it is checked before it is used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

from mole.experts.backends.entries import AnyCard
from mole.experts.backends.hub_requests import Busy, HubRequests
from mole.experts.errors import Damaged, LibraryError, Refused, Unreachable
from mole.experts.schema import README_FILE
from mole.untrusted import refuse_pickles, shown

MOST_ROWS = 200_000
MOST_COMMITS = 20_000
_AT_ONCE = 500  # paths in one request
_LONGEST_PATH = 1024
_OID = re.compile(r"[0-9a-f]{40}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_BAD = re.compile(r"[\\\x00-\x1f\x7f-\x9f]|^[A-Za-z]:|^/|/$")


class Row(NamedTuple):
    """A file or folder of a commit: its git id; of a file its size in bytes, of a large one its sha256."""

    path: str
    is_folder: bool
    oid: str
    size: int
    sha256: str | None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


class Change(NamedTuple):
    """A commit of the history: its id, its title and the text below it."""

    oid: str
    title: str
    text: str


class HubReading(HubRequests):
    """Commits are told by their ids: what is read of one commit fits together."""

    def head(self, revision: str) -> str:
        """The commit that a branch, tag or commit names now. Raises NoLibrary."""
        value, _ = self.get_json(f"/revision/{quote(revision, safe='')}", expand="sha")
        return self._oid(value.get("sha") if isinstance(value, dict) else None)

    def refs(self) -> tuple[set[str], set[str]]:
        """The names of all branches and of all tags."""
        value, _ = self.get_json("/refs")
        try:
            return {str(row["name"]) for row in value["branches"]}, {str(row["name"]) for row in value["tags"]}
        except (KeyError, TypeError):
            raise self._malformed(value) from None

    def rows(self, commit: str, folder: str = "", *, recursive: bool = False) -> list[Row]:
        """What a folder of a commit holds. Raises Missing."""
        below = f"/{quote(folder, safe='')}" if folder else ""
        flags = {"recursive": recursive, "expand": False}
        found: dict[str, Row] = {}
        for row in self._pages(f"/tree/{commit}{below}", MOST_ROWS, **flags):
            if row.path in found or (folder and not row.path.startswith(f"{folder}/")):
                raise Damaged(
                    f"{self.what}: the listing of {self.clean(folder or '/')} holds {self.clean(row.path)} wrongly"
                )
            found[row.path] = row
        return list(found.values())

    def _pages(self, path: str, most: int, **params: Any) -> Iterator[Row]:
        value, following = self.get_json(path, **params)
        count = 0
        while True:
            for row in self._list(value):
                yield self._row(row)
            count += len(value)
            if following is None:
                return
            if not value or count > most:
                raise Damaged(f"{self.what}: a listing without end ({count:,} rows)")
            value, following = self.next_page(following)

    def paths(self, commit: str, paths: Sequence[str]) -> dict[str, Row]:
        """The rows of those paths that a commit has."""
        found = {}
        for start in range(0, len(paths), _AT_ONCE):
            some = list(paths[start : start + _AT_ONCE])
            answer = self.post_form(f"/paths-info/{commit}", {"paths": some, "expand": False})
            for row in map(self._row, self._list(answer)):
                if row.path not in some or row.path in found:
                    raise Damaged(f"{self.what}: asked for other paths, the Hub tells of {self.clean(row.path)}")
                found[row.path] = row
        return found

    def history(self, revision: str) -> Iterator[Change]:
        """The commits that lead to a revision, the newest first."""
        value, following = self.get_json(f"/commits/{quote(revision, safe='')}")
        count = 0
        while True:
            for row in self._list(value):
                if not isinstance(row, dict) or not isinstance(row.get("title"), str):
                    raise self._malformed(row)
                yield Change(self._oid(row.get("id")), row["title"], str(row.get("message") or ""))
            count += len(value)
            if following is None or not value or count > MOST_COMMITS:
                return
            value, following = self.next_page(following)

    def read(self, revision: str, path: str, most: int) -> tuple[bytes, str]:
        """A small file whole, and the commit that it is of. Raises Missing; Damaged for more than `most` bytes."""

        def take(response: Any) -> tuple[bytes, str | None]:
            return b"".join(self.chunks(response, most)), response.headers.get("x-repo-commit")

        data, commit = self.get_file(f"{quote(revision, safe='')}/{quote(path)}", take)
        if commit is None or not _OID.fullmatch(commit):  # a storage answered: read again, of a commit that is known
            commit = self.head(revision)
            data, _ = self.get_file(f"{commit}/{quote(path)}", take)
        return data, commit

    def download(self, commit: str, path: str, target: Path, wanted: dict[str, Any]) -> None:
        """Write a file to `target`, with the size and sha256 that are `wanted`; a broken transfer goes on where it was.

        A file with other content is asked for once more, and then Damaged.
        """
        for attempt in (1, 2):
            with target.open("wb") as file:
                try:
                    digest = self._transfer(f"{commit}/{quote(path)}", file, wanted["size"])
                except Damaged:
                    if attempt == 2:
                        raise
                    continue
            if digest == wanted["sha256"]:
                return
        raise Damaged(f"{self.what}/{path} is not what the card says: other content; it is damaged or was changed")

    def _transfer(self, place: str, file: BinaryIO, size: int) -> str:
        """The sha256 of what was written."""
        digest, done = hashlib.sha256(), 0

        def take(response: Any) -> None:
            nonlocal digest, done
            if done and response.status_code != 206:
                file.seek(0)
                file.truncate()
                digest, done = hashlib.sha256(), 0
            for chunk in self.chunks(response, size - done):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)

        problem: LibraryError = Unreachable(f"{self.what}: not reached")
        for wait in self.patience.pauses(0.1):
            try:
                ranges = {"range": f"bytes={done}-"} if done else None
                self.get_file(place, take, ranges, again=False)
                break
            except Busy as error:
                problem, after = error.problem, error.after
            if not wait(after):
                raise problem
        if done != size:
            raise Damaged(f"{self.what}/{place.partition('/')[2]} has {done:,} bytes instead of {size:,}")
        return digest.hexdigest()

    def _row(self, row: Any) -> Row:
        """A row of a listing: no path that leads elsewhere, no size below zero."""
        if not isinstance(row, dict) or row.get("type") not in ("file", "directory"):
            raise self._malformed(row)
        path, size, large = row.get("path"), row.get("size", 0), row.get("lfs")
        if not isinstance(path, str) or not 0 < len(path) <= _LONGEST_PATH or _BAD.search(path):
            raise Damaged(f"{self.what}: a listing with the path {self.clean(path)}")
        if {"", ".", ".."} & set(path.split("/")):
            raise Damaged(f"{self.what}: a listing with the path {self.clean(path)}")
        if type(size) is not int or not 0 <= size < 2**63:
            raise Damaged(f"{self.what}: {self.clean(path)} with the size {self.clean(size)}")
        sha256 = large.get("oid") if isinstance(large, dict) else None
        if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            raise self._malformed(row)
        return Row(path, row["type"] == "directory", self._oid(row.get("oid")), size, sha256)

    def _list(self, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self._malformed(value)
        return value

    def _oid(self, value: Any) -> str:
        if not isinstance(value, str) or not _OID.fullmatch(value):
            raise self._malformed(value)
        return value

    def _malformed(self, value: Any) -> Damaged:
        return Damaged(f"{self.what}: an answer of the Hub is malformed: {self.clean(value)}")


def check_rows(rows: Iterable[Row], card: AnyCard, where: str, card_file: str) -> None:
    """Raise Damaged or Refused if the listing of a folder is not what its card says, before anything is loaded."""
    found = {row.name: row for row in rows}
    refuse_pickles(found, where)
    for file in sorted(set(found) - set(card.files) - {card_file, README_FILE}):
        raise Refused(f"{where}: {shown(file)} is not listed in the card; the folder may hold only its files")
    for file, wanted in card.files.items():
        row = found.get(file)
        if row is None or row.is_folder:
            raise Damaged(f"{where}/{file} is listed in the card and missing")
        if row.size != wanted["size"]:
            raise Damaged(f"{where}/{file} has {row.size:,} bytes; the card says {wanted['size']:,}")
        if row.sha256 not in (None, wanted["sha256"]):
            raise Damaged(f"{where}/{file} is not what the card says: other content of the same size")


def git_id(data: bytes) -> str:
    """The id that git gives to a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
