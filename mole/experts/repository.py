"""A folder of somebody's repository on the Hub, for import: its commit first, sizes before, digests after."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mole.experts.backends.hub_address import DEFAULT_BRANCH, check_repo_id, check_revision
from mole.experts.errors import Damaged, LibraryError, Refused
from mole.experts.importing import Source
from mole.untrusted import MAX_JSON_BYTES, MAX_WEIGHTS_BYTES, shown

if TYPE_CHECKING:
    from mole.experts.backends.hub_reading import HubReading, Row

_FORM = "write hf://user/repository[/folder][@revision]"


def read_repository(address: str, wanted: Callable[[list[str], str], list[str]]) -> Source:
    """The files of a folder that `wanted` names of all that it holds, in memory; nothing else is loaded.

    Raises LibraryError for another address, NoLibrary, Refused for a file that is too large, Damaged for one that is
    not what the listing says, Unreachable.
    """
    from mole.experts.backends.hub_reading import HubReading
    from mole.experts.backends.hub_requests import Missing, Patience

    repo_id, folder, revision = parse(address)
    home = f"hf://{repo_id}" + (f"/{folder}" if folder else "")
    reading = HubReading(repo_id, home, Patience(total=120.0))
    commit = reading.head(revision or DEFAULT_BRANCH)
    try:
        rows = {row.name: row for row in reading.rows(commit, folder) if not row.is_folder}
    except Missing:
        raise LibraryError(f"{home}: there is no such folder in the repository") from None
    chosen = wanted(sorted(rows), home)
    for name in chosen:
        most = MAX_WEIGHTS_BYTES if name.endswith(".safetensors") else MAX_JSON_BYTES
        if rows[name].size > most:
            raise Refused(f"{home}/{name} has {rows[name].size:,} bytes; at most {most:,} are taken")
    files = {}
    with tempfile.TemporaryDirectory(prefix="mole-import-") as place:
        for name in chosen:
            files[name] = _load(reading, commit, rows[name], Path(place) / name)
    return Source(files, home, (folder or repo_id).rpartition("/")[2], home, commit, frozenset(rows))


def _load(reading: HubReading, commit: str, row: Row, target: Path) -> bytes:
    """A file's bytes, by its sha256 where the listing has one, else by its id in git."""
    from mole.experts.backends.hub_reading import git_id

    if row.sha256 is not None:
        reading.download(commit, row.path, target, {"size": row.size, "sha256": row.sha256})
        data = target.read_bytes()
        target.unlink()
        return data
    data, _ = reading.read(commit, row.path, row.size)
    if git_id(data) != row.oid:
        raise Damaged(f"{reading.what}/{row.name} is not what the listing says; it is damaged or was changed")
    return data


def parse(address: str) -> tuple[str, str, str | None]:
    """`hf://user/repo[/folder][@revision]` → (repository, folder or "", revision or None). Raises LibraryError."""
    rest = address.removeprefix("hf://")
    path, at, revision = rest.partition("@")
    parts = path.rstrip("/").split("/")
    if rest == address or len(address) > 1000 or any(mark in rest for mark in "?#%:"):  # what may be a secret: unsaid
        raise LibraryError(
            f"an address holds no user, password, query or fragment, and is no longer than 1,000: {_FORM}"
        )
    if parts[0] in ("datasets", "spaces") or len(parts) < 2:
        where = "that is none" if at else shown(address)  # before '@' somebody may have put a token
        raise LibraryError(f"{where}: adapters lie in model repositories; {_FORM}")
    if any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts):
        raise LibraryError(f"{shown(address)}: no '..' and no empty part in an address; {_FORM}")
    repo_id = check_repo_id("/".join(parts[:2]), address)
    return repo_id, "/".join(parts[2:]), check_revision(revision, address) if at else None
