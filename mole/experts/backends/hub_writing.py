"""Changes of a repository on the Hub: one commit for a batch, on the head that was compared, again until it is settled.

    head → compare → commit with this parent → busy, moved, or no answer: from the beginning

A commit says in its text what it does, one line for each entry, and carries a number of its own: by the lines old
revisions are found, by the number a commit whose answer was lost.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mole.experts.backends.hub_reading import Change, HubReading, git_id
from mole.experts.backends.hub_requests import Busy, scrub_text, transport_error
from mole.experts.errors import Conflict, LibraryError, NoLibrary, Refused, Unreachable
from mole.experts.schema import README_FILE

_TITLE = 200  # characters
_LINE = re.compile(r"^(\S+) (?:at ([0-9a-f]{64})|removed)$", re.ASCII | re.MULTILINE)
_NUMBER = re.compile(r"^change ([0-9a-f]{32})$", re.ASCII | re.MULTILINE)
_LATEST = 200  # commits among which one's own is looked for


@dataclass(frozen=True)
class Entry:
    """What becomes of one path: a staged folder with these files and this card, or, without a folder, nothing."""

    path: str
    expect: str | None
    folder: Path | None = None
    files: tuple[str, ...] = ()
    card_file: str = ""
    card_bytes: bytes = b""
    revision: str = ""

    @property
    def line(self) -> str:
        """What the commit's text says of it."""
        return f"{self.path} at {self.revision}" if self.folder else f"{self.path} removed"


@dataclass
class Batch:
    """Entries that are committed together, under a title, with the page of the repository if that is given."""

    entries: Sequence[Entry]
    title: str
    what: str
    page: bytes | None = None
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def text(self) -> str:
        """The text below the title."""
        return "\n".join([*(entry.line for entry in self.entries), f"change {self.number}"])


def revisions_of(change: Change, path: str) -> tuple[list[str], bool]:
    """The revisions that a commit says to have put at a path, and whether it says all that it did."""
    lines = _LINE.findall(change.text)
    return [revision for at, revision in lines if at == path and revision], bool(_NUMBER.search(change.text))


def paths_at(change: Change, revision: str) -> list[str]:
    """The paths at which a commit says to have put a revision."""
    return [at for at, one in _LINE.findall(change.text) if one == revision]


class HubWriting(HubReading):
    """Commits to one branch."""

    def commit(self, branch: str, batch: Batch, *, create: bool, private: bool) -> str:
        """Have the batch done: all or nothing. The commit in which it is. Raises Conflict and changes nothing.

        `create`: make the repository if it is missing, `private` or not. Raises NoLibrary, ReadOnly, Unreachable.
        """
        uncertain = False
        problem: LibraryError = Unreachable(f"{self.what}: not reached")
        for number, wait in enumerate(self.patience.pauses()):
            try:
                head = self._head(branch, create, private)
                todo, page = self._todo(head, batch)
                if not todo and page is None:
                    return head
                return self._send(branch, head, todo, page, batch)
            except Busy as error:
                uncertain, problem, after = uncertain or error.status not in (409, 412), error.problem, error.after
                if number == 0:
                    self.tell_of_waiting(error, self.patience.total)
            except Conflict:
                if uncertain and (landed := self._landed(branch, batch)):
                    return landed
                raise
            if not wait(after):
                break
        raise problem

    def _head(self, branch: str, create: bool, private: bool) -> str:
        try:
            return self.head(branch)
        except NoLibrary:
            if not create:
                raise
        self._call("create_repo", self.repo_id, private=private, exist_ok=True)
        return self.head(branch)

    def _todo(self, head: str, batch: Batch) -> tuple[list[tuple[Entry, bool]], bytes | None]:
        """What is not yet so at a commit, each with whether something is there; and the page if it is another.

        Raises Conflict.
        """
        cards = [f"{entry.path}/{entry.card_file}" for entry in batch.entries if entry.folder]
        there = self.paths(head, [*(entry.path for entry in batch.entries), *cards, README_FILE])
        todo = []
        for entry in batch.entries:
            row, card = there.get(entry.path), there.get(f"{entry.path}/{entry.card_file}")
            if entry.folder is None and row is None:
                continue
            if entry.folder is not None and card is not None and card.oid == git_id(entry.card_bytes):
                continue
            if entry.folder is not None and entry.expect is None and row is not None and card is None:
                raise Refused(f"{self.what}/{entry.path} is there and no {batch.what}; move it away")
            if (row.oid if row else None) != entry.expect:
                raise Conflict(entry.path)
            todo.append((entry, row is not None))
        page = there.get(README_FILE)
        same = batch.page is None or (page is not None and page.oid == git_id(batch.page))
        return todo, None if same else batch.page

    def _send(
        self, branch: str, head: str, todo: Iterable[tuple[Entry, bool]], page: bytes | None, batch: Batch
    ) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = []
        for entry, exists in todo:
            if entry.folder is None:
                operations.append(CommitOperationDelete(f"{entry.path}/", is_folder=True))
                continue
            kept = {f"{entry.path}/{name}" for name in entry.files}
            stale = [row for row in self.rows(head, entry.path) if row.path not in kept] if exists else []
            operations += [CommitOperationDelete(row.path, is_folder=row.is_folder) for row in stale]
            operations += [CommitOperationAdd(f"{entry.path}/{name}", entry.folder / name) for name in entry.files]
        if page is not None:
            operations.append(CommitOperationAdd(README_FILE, page))
        title = " ".join(scrub_text(batch.title).split())[:_TITLE] or "Change experts"
        texts = {"commit_message": title, "commit_description": batch.text}
        done = self._call("create_commit", self.repo_id, operations, revision=branch, parent_commit=head, **texts)
        return self._oid(done.oid)

    def _landed(self, branch: str, batch: Batch) -> str | None:
        """The commit of this batch, if it is in the history: its answer was lost, and others went on from it."""
        for change in islice(self.history(branch), _LATEST):
            if batch.number in _NUMBER.findall(change.text):
                return change.oid
        return None

    def _call(self, method: str, *args: Any, **more: Any) -> Any:
        """A call of the client, its errors translated: those that pass are Busy."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return getattr(self.api, method)(*args, **more)
        except (transport_error(), ConnectionError, RuntimeError, ValueError) as error:
            causes = list(_causes(error))
            answers = [cause for cause in causes if isinstance(cause, HfHubHTTPError)]
            if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
                problem = LibraryError(f"{self.what}: the Hub's client refuses this: {self.clean(str(error))}")
            elif answers:
                problem = self.refusal(answers[0].response.status_code, answers[0].response.headers)
            else:
                passing = [cause for cause in causes if isinstance(cause, (transport_error(), OSError))]
                problem = self.unreachable((passing or causes[-1:])[0])
                problem = Busy(problem) if passing or len(causes) == 1 else problem
        raise problem


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
