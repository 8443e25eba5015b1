"""A library in a model repository of the Hugging Face Hub: one folder for each expert, one commit for each change.

The version of an expert is the git id of its folder. What is read is read of one commit, so it fits together; what is
written is compared and committed on one head, so nobody's work is lost. Removed experts stay in the history.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mole.experts import folder as folders
from mole.experts.backends.backend import Change, Garbage
from mole.experts.backends.changes import check_changes, check_revision
from mole.experts.backends.entries import ARTEFACTS, EXPERTS
from mole.experts.backends.hub_address import DEFAULT_BRANCH, HubAddress, check_repo_id, is_commit, parse_hub_address
from mole.experts.backends.hub_address import check_revision as check_branch
from mole.experts.backends.hub_reading import Row, check_rows
from mole.experts.backends.hub_requests import Missing, Patience, scrub_text
from mole.experts.backends.hub_writing import Batch, Entry, HubWriting, paths_at, revisions_of
from mole.experts.card import MAX_CARD_BYTES
from mole.experts.errors import Conflict, Damaged, NoLibrary, ReadOnly, UnknownExpert
from mole.experts.schema import README_FILE
from mole.registry import LIBRARIES, config_dataclass, unknown

DERIVED = ".mole/derived"
_OURS = {README_FILE, "LICENSE", ".gitattributes", ".gitignore", ".mole"}  # what may lie beside the experts
_AT_ONCE = 8
_UNTOLD = 300  # commits of others that are looked through for an old revision


class HubBackend:
    """No request before the first call. The token comes from the environment or the client's login, never from here.

    `create`: publishing makes a repository that is missing, `private` or not.
    """

    after_removal = "in the history of the repository, for good"

    def __init__(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        create: bool = False,
        private: bool = True,
        patience: Patience | None = None,
    ) -> None:
        address = HubAddress(check_repo_id(repo_id), check_branch(revision) if revision else None)
        self.url = address.url
        self._revision = revision or DEFAULT_BRANCH
        self._create, self._private = create, private
        self._hub = HubWriting(repo_id, self.url, patience or Patience())
        self._entries, self._prefix = EXPERTS, ""
        self._is_branch = revision is None
        self._proven: set[str] = set()  # git ids of folders that hold a card
        self._listed: tuple[str, dict[str, str]] = ("", {})

    @property
    def derived(self) -> HubBackend:
        return self._derived

    @cached_property
    def _derived(self) -> HubBackend:
        revision = None if self._is_branch and self._revision == DEFAULT_BRANCH else self._revision
        other = HubBackend(
            self._hub.repo_id,
            revision=revision,
            create=self._create,
            private=self._private,
            patience=self._hub.patience,
        )
        other._entries, other._prefix = ARTEFACTS, f"{DERIVED}/"
        return other

    def exists(self) -> bool:
        try:
            self.head()
        except NoLibrary:
            return False
        return True

    def head(self) -> str:
        """The commit at which the library is: one request."""
        return self._hub.head(self._revision)

    def cards(self) -> dict[str, str]:
        head = self.head()
        if self._listed[0] != head:
            found = {row.name: row.oid for row in self._rows(head) if row.is_folder and self._entries.is_name(row.name)}
            unsure = {self._card_path(name): oid for name, oid in found.items() if oid not in self._proven}
            self._proven |= {unsure[path] for path in self._hub.paths(head, sorted(unsure))}
            self._listed = (head, {name: found[name] for name in sorted(found) if found[name] in self._proven})
        return dict(self._listed[1])

    def _rows(self, commit: str) -> list[Row]:
        try:
            return self._hub.rows(commit, self._prefix.rstrip("/"))
        except Missing:
            return []

    def _path(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _card_path(self, name: str) -> str:
        return f"{self._prefix}{name}/{self._entries.card_file}"

    def card(self, name: str, revision: str | None = None) -> tuple[Any, str]:
        card, commit = self._find(self._entries.check_name(name), revision)
        return card, self._version(commit, name)

    def _version(self, commit: str, name: str) -> str:
        found = self._hub.paths(commit, [self._path(name)])
        if not found:
            raise Damaged(f"{self.url}/{name}: the Hub gives the card and denies its folder")
        return found[self._path(name)].oid

    def version(self, name: str) -> str | None:
        found = self._hub.paths(self.head(), [self._path(self._entries.check_name(name))])
        return found[self._path(name)].oid if found else None

    def bearers(self, revision: str) -> list[str]:
        check_revision(revision)
        said = {path for change in self._hub.history(self._revision) for path in paths_at(change, revision)}
        found = {path.removeprefix(self._prefix) for path in said if path.startswith(self._prefix)}
        return sorted(name for name in found if self._entries.is_name(name))

    def read_cards(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        names = [self._entries.check_name(name) for name in names]
        listed, known = self._listed
        commit = listed if listed and all(name in known for name in names) else self.head()

        def read(name: str) -> Any:
            try:
                return self._parsed(name, self._hub.read(commit, self._card_path(name), MAX_CARD_BYTES)[0])
            except Damaged as error:
                return error
            except Missing:
                return None

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for name, card in zip(names, pool.map(read, names), strict=True):
                if card is not None:
                    yield name, card

    def _parsed(self, name: str, data: bytes) -> Any:
        try:
            return self._entries.parse(data, f"{self.url}/{name}")
        except Damaged as error:
            problem = Damaged(scrub_text(str(error)))
        raise problem  # alone: what lies under the other holds the whole card

    def _find(self, name: str, revision: str | None) -> tuple[Any, str]:
        """The card of an expert, or of the one old revision that starts with `revision`, and a commit that has it."""
        if revision is not None:
            check_revision(revision)
        current = None
        try:
            data, commit = self._hub.read(self._revision, self._card_path(name), MAX_CARD_BYTES)
            current = self._parsed(name, data)
        except Missing:
            if revision is None:
                raise UnknownExpert(f"{self.url}: {unknown(self._entries.what, name, self.cards())}") from None
        except Damaged:
            if revision is None:
                raise
        if current is not None and (revision is None or current.revision.startswith(revision)):
            return current, commit
        assert revision is not None
        return self._find_old(name, revision)

    def _find_old(self, name: str, revision: str) -> tuple[Any, str]:
        told: dict[str, str] = {}
        untold: list[str] = []
        for change in self._hub.history(self._revision):
            revisions, complete = revisions_of(change, self._path(name))
            told |= {one: change.oid for one in revisions if one not in told}
            if not complete:
                untold.append(change.oid)
        found = {one: commit for one, commit in told.items() if one.startswith(revision)}
        candidates = list(found.values()) or self._with_card(name, untold[:_UNTOLD])
        cards = {}
        for commit in candidates:  # what a commit says is a hint: the card itself decides
            card = self._card_at(commit, name)
            if card is not None and card.revision.startswith(revision):
                cards.setdefault(card.revision, (card, commit))
        if len(cards) != 1:
            what = "no" if not cards else "more than one"
            kept = sorted(one[:8] for one in told)
            raise UnknownExpert(f"{self.url}/{name}: {what} revision starts with {revision} (old ones: {kept})")
        return next(iter(cards.values()))

    def _with_card(self, name: str, commits: Sequence[str]) -> list[str]:
        """Of commits that do not say what they did, those in which the expert's card is, each card once."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = pool.map(lambda commit: self._hub.paths(commit, [self._card_path(name)]), commits)
            return list(
                {row.oid: commit for commit, rows in zip(commits, found, strict=True) for row in rows.values()}.values()
            )

    def _card_at(self, commit: str, name: str) -> Any:
        try:
            return self._parsed(name, self._hub.read(commit, self._card_path(name), MAX_CARD_BYTES)[0])
        except (Missing, Damaged):
            return None

    def fetch(self, name: str, dest: Path, revision: str | None = None) -> Any:
        card, commit = self._find(self._entries.check_name(name), revision)
        self._check_rows(name, card, commit)
        try:
            with tempfile.TemporaryDirectory(prefix=".new-", dir=dest) as quarantine:
                for file, wanted in card.files.items():
                    self._hub.download(commit, f"{self._path(name)}/{file}", Path(quarantine) / file, wanted)
                for file in card.files:
                    (Path(quarantine) / file).rename(dest / file)
            folders.write_card(card, dest, self._entries)
            folders.sync(dest)
        except BaseException:
            for entry in dest.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            raise
        return card

    def _check_rows(self, name: str, card: Any, commit: str) -> None:
        check_rows(self._hub.rows(commit, self._path(name)), card, f"{self.url}/{name}", self._entries.card_file)

    def publish(self, name: str, folder: Path, expect: str | None = None) -> str:
        self._entries.check_name(name)
        commit = self._write([Change(name, folder, expect)], f"{'Update' if expect else 'Publish'} {name}", None)
        return self._version(commit, name)

    def remove(self, name: str, expect: str) -> None:
        self._entries.check_name(name)
        self._write([Change(name, None, expect)], f"Remove {name}", None)

    def apply(self, changes: Sequence[Change], message: str, *, readme: str | None = None) -> str:
        return self._write(changes, message, readme)

    def _write(self, changes: Sequence[Change], message: str, readme: str | None) -> str:
        check_changes(changes, self._entries)
        page = None if readme is None else readme.encode()
        with tempfile.TemporaryDirectory(prefix="mole-hub-") as place:
            entries = [self._staged(change, Path(place) / str(number)) for number, change in enumerate(changes)]
            self._must_be_branch()
            try:
                batch = Batch(entries, message, self._entries.what, page)
                create = self._create and all(change.expect is None for change in changes)
                commit = self._hub.commit(self._revision, batch, create=create, private=self._private)
            except Conflict as error:
                path = str(error)
            else:
                return commit
        raise self._conflict(path.removeprefix(self._prefix), changes)

    def _staged(self, change: Change, stage: Path) -> Entry:
        """A copy that nobody changes while it goes up, verified while it is made."""
        if change.folder is None:
            return Entry(self._path(change.name), change.expect)
        try:
            card = folders.read_card(change.folder, self._entries)
        except FileNotFoundError:
            raise Damaged(f"{change.folder}: no {self._entries.card_file} in it") from None
        folders.check_entries(change.folder, card, self._entries)
        stage.mkdir()
        folders.copy_files(change.folder, stage, card, self._entries)
        files = tuple(sorted(path.name for path in stage.iterdir()))
        facts = (self._entries.card_file, card.to_bytes(), card.revision)
        return Entry(self._path(change.name), change.expect, stage, files, *facts)

    def _conflict(self, name: str, changes: Sequence[Change]) -> Conflict:
        (expect,) = [change.expect for change in changes if change.name == name]
        try:
            revision = self.card(name)[0].revision
        except UnknownExpert:
            return Conflict(f"{self.url}/{name} was removed by somebody else meanwhile")
        except Damaged:
            revision = None
        at = f"at revision {revision[:8]}" if revision else "damaged"
        return Conflict(f"{self.url}/{name} is there, {at}" + (", changed meanwhile" if expect else ""), revision)

    def check_writable(self) -> None:
        self._must_be_branch()
        if not self._create:
            self.head()

    def _must_be_branch(self) -> None:
        if self._is_branch:
            return
        if is_commit(self._revision):
            raise ReadOnly(f"{self.url} is one commit, which never changes; write to a branch")
        branches, tags = self._hub.refs()
        if self._revision not in branches:
            what = "is a tag, which never changes" if self._revision in tags else "is no branch"
            raise ReadOnly(f"{self.url}: {self._revision} {what}; write to a branch ({', '.join(sorted(branches))})")
        self._is_branch = True

    def verify(self, name: str, *, quick: bool = False) -> Any:
        card, commit = self._find(self._entries.check_name(name), None)
        self._check_rows(name, card, commit)
        if not quick:
            with tempfile.TemporaryDirectory(prefix="mole-hub-") as place:
                for file, wanted in card.files.items():
                    self._hub.download(commit, f"{self._path(name)}/{file}", Path(place) / file, wanted)
                    (Path(place) / file).unlink()
        return card

    def strays(self) -> list[str]:
        experts = self.cards()
        mine = set() if self._prefix else _OURS
        return sorted({row.name for row in self._rows(self._listed[0])} - set(experts) - mine)

    def collect(self, older_than: timedelta, keep: int, *, dry_run: bool) -> list[Garbage]:
        """Nothing: the history of a repository is never rewritten, and holds all revisions."""
        return []

    def readme(self) -> str | None:
        """The page of the repository, if it has one. Raises NoLibrary."""
        try:
            return self._hub.read(self._revision, README_FILE, 16 * MAX_CARD_BYTES)[0].decode(errors="replace")
        except Missing:
            return None


@config_dataclass
class HubConfig:
    """A library in a model repository of the Hugging Face Hub."""

    name: Literal["hub"] = "hub"
    url: str
    create: bool = False
    private: bool = True

    def __post_init__(self) -> None:
        if "://" in self.url:  # what is no address at all is told when it is opened
            parse_hub_address(self.url)


@LIBRARIES.register("hub", HubConfig)
def hub_library(config: HubConfig) -> HubBackend:
    """The backend of a library on the Hub."""
    address = parse_hub_address(config.url)
    return HubBackend(address.repo_id, revision=address.revision, create=config.create, private=config.private)
