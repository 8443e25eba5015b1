"""What every backend checks of a batch before it writes, and what it tells when it fails half-way."""

from __future__ import annotations

from collections.abc import Sequence

from mole.experts.backends.backend import Change
from mole.experts.backends.entries import Entries
from mole.experts.errors import LibraryError
from mole.untrusted import shown


def check_changes(changes: Sequence[Change], entries: Entries) -> None:
    """Raise LibraryError for a bad name, or one that stands in the batch twice; a removal says what it expects."""
    seen = set()
    for change in changes:
        entries.check_name(change.name)
        if change.name in seen:
            raise LibraryError(f"{entries.what} {change.name!r} stands twice in one batch: make it two")
        if change.folder is None and change.expect is None:
            raise LibraryError(f"{entries.what} {change.name!r}: to remove it, say which version is expected")
        seen.add(change.name)


def note_written(error: BaseException, written: Sequence[str], changes: Sequence[Change]) -> None:
    """Say in a note on `error` which changes of the batch were made before it; none of a batch of one."""
    if len(changes) > 1:
        rest = [change.name for change in changes[len(written) :]]
        error.add_note(f"written before this: {', '.join(written) or 'nothing'}; not written: {', '.join(rest)}")


def check_revision(revision: str) -> str:
    """The first digits of a revision, if they are that. Raises LibraryError."""
    if not (8 <= len(revision) <= 64 and set(revision) <= set("0123456789abcdef")):
        raise LibraryError(f"revision {shown(revision)}: 8 to 64 small hexadecimal digits are wanted")
    return revision
