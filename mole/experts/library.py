"""A library: experts under names, in a place that its backend knows. It has a backend; it is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mole.experts import artefacts, collecting, copying, verifying
from mole.experts.address import open_backend
from mole.experts.backends import Backend
from mole.experts.backends.backend import Garbage
from mole.experts.batch import Batch, open_batch
from mole.experts.card import Card
from mole.experts.card_cache import CardCache
from mole.experts.copying import Copied
from mole.experts.damage import sound_cards, way_out
from mole.experts.errors import Conflict, Damaged, ReadOnly, UnknownExpert
from mole.experts.expert import Expert
from mole.experts.expert_cache import ExpertCache, Limits
from mole.experts.filters import keep
from mole.experts.names import check_name
from mole.experts.scores import Best, best_of, with_score
from mole.experts.verifying import Problem
from mole.registry import unknown
from mole.untrusted import shown


class ExpertLibrary:
    """Experts by name, always in the order of names. Constructors read and write nothing, and do no network.

    `cache_dir` keeps cards, and experts that were fetched from elsewhere, for later processes; None: cards are kept in
    memory only. `read_only` refuses every write. Errors are LibraryError and what derives from it.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        cache_dir: str | Path | None = None,
        limits: Limits | None = None,
        read_only: bool = False,
    ):
        self.backend = backend
        self.read_only = read_only
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self._cards = CardCache(backend, self.cache_dir)
        self._fetched = ExpertCache(backend, self.cache_dir, limits or Limits())
        self._seen: dict[str, str] = {}  # name → revision that this object has read last

    @classmethod
    def open(
        cls,
        address: str,
        *,
        settings: Any = None,
        cache_dir: str | Path | None = None,
        limits: Limits | None = None,
        read_only: bool = False,
    ) -> ExpertLibrary:
        """The library at an address: a folder, `hf://user/repo`, `s3://bucket/prefix`, `az://account/container`.

        `settings` are the variant of the `library` config group that fits (region, endpoint …), None for its defaults.
        """
        return ExpertLibrary(open_backend(address, settings), cache_dir=cache_dir, limits=limits, read_only=read_only)

    @property
    def url(self) -> str:
        """The address."""
        return self.backend.url

    @property
    def after_removal(self) -> str:
        """How long the bytes of a removed expert remain, as the end of a sentence."""
        return self.backend.after_removal

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def exists(self) -> bool:
        """Whether there is a library at the address; adding an expert makes one."""
        return self.backend.exists()

    def names(self) -> list[str]:
        """Names of all experts. Raises NoLibrary."""
        return self._cards.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> Expert:
        return self.get_expert(name)

    def card(self, name: str, revision: str | None = None) -> Card:
        """The card of one expert, or of an old revision of it (its first 8 to 64 digits)."""
        return self._located(name, revision)[1]

    def _located(self, name: str, revision: str | None) -> tuple[str, Card]:
        """The name under which a revision lies, and its card: before a rename it was another name."""
        if revision is not None:
            return copying.located(self.backend, name, revision)
        card, _ = self.backend.card(name)
        self.saw(name, card)
        return name, card

    def cards(self, where: Mapping[str, Any] | None = None) -> dict[str, Card]:
        """Name → card of every expert, or of those that `where` keeps (see `filters`).

        Raises Damaged for the first card that is, LibraryError if `where` keeps none.
        """
        cards, problems = self.look()
        if problems:
            raise problems[min(problems)]
        return keep(cards, where) if where else cards

    def look(self) -> tuple[dict[str, Card], dict[str, Exception]]:
        """Name → card of all that are sound, and name → error of the others."""
        found = self._cards.read()
        cards = {name: card for name, card in found.items() if isinstance(card, Card)}
        for name, card in cards.items():
            self.saw(name, card)
        return cards, {name: error for name, error in found.items() if isinstance(error, Exception)}

    def get_expert(self, name: str, revision: str | None = None) -> Expert:
        """One expert: its card now, its weights, verified, when they are asked for."""
        return self.expert_of(*self._located(name, revision))

    def expert_of(self, name: str, card: Card) -> Expert:
        """The expert whose card, read from this library before, is `card`."""
        where = f"{self.url}/{name}"
        return Expert(card, fetch=lambda dest: self._fetched.fetch(name, dest, card), where=where)

    def check_free(self, name: str) -> None:
        """Raise LibraryError if no expert can be added under `name`: not a valid name, taken, or not to be written."""
        check_name(name)
        self.check_writable()
        if self.exists():
            try:
                card = self.card(name)
            except UnknownExpert:
                return
            except Damaged as error:
                raise Damaged(f"{error}; {way_out(self.url, name)}") from error
            raise self.taken(name, card.revision)

    def check_writable(self) -> None:
        """Raise ReadOnly or NoLibrary if nothing could be written here. Writes nothing."""
        self._may_write()
        self.backend.check_writable()

    def batch(self, message: str = "", *, readme: str | None = None) -> AbstractContextManager[Batch]:
        """Changes that are made together when the `with` block ends, none of them if it raises.

        On the Hub they are one commit with `message` as its title; elsewhere each expert is whole by itself.
        """
        self._may_write()
        return open_batch(self, message, readme)

    def add_expert(self, expert: Expert, expert_name: str, *, message: str | None = None) -> Card:
        """Publish an expert under a free name. The same revision again is no change. Returns the card as published.

        Raises Conflict if the name is taken by another revision.
        """
        with self.batch() as batch:
            return batch.add_expert(expert, expert_name, message=message)

    def update_expert(self, name: str, expert: Expert, *, expect: str | None = None, message: str = "") -> Card:
        """Put another revision in the place of the one that is there, which becomes the newest of its history.

        `expect` is the revision that is to be replaced; by default the one that this object read last, else the current
        one. Raises Conflict if the name is at another one. Returns the card as published.
        """
        with self.batch() as batch:
            return batch.update_expert(name, expert, expect=expect, message=message)

    def edit_card(self, name: str, *, expect: str | None = None, message: str = "", **facts: Any) -> Card:
        """Change facts of a card: tasks, tags, description, license, author, data, training, scores, extra.

        The weights stay. `expect` as in `update_expert`. Returns the card as published.
        """
        with self.batch() as batch:
            return batch.edit_card(name, expect=expect, message=message, **facts)

    def rename_expert(self, old: str, new: str, *, expect: str | None = None) -> Card:
        """Give an expert another name, which must be free; card, history and artefacts stay its own."""
        with self.batch() as batch:
            return batch.rename_expert(old, new, expect=expect)

    def restore_expert(self, name: str, revision: str, *, expect: str | None = None, message: str = "") -> Card:
        """Put an old revision on top again, as a new revision; nothing is rewritten. Also for one that was removed."""
        with self.batch() as batch:
            return batch.restore_expert(name, revision, expect=expect, message=message)

    def remove_expert(self, name: str, *, expect: str | None = None) -> Card | None:
        """Take an expert away, and what was computed from it alone. `expect` as in `update_expert`.

        Returns its card; None if that is damaged.
        """
        with self.batch() as batch:
            return batch.remove_expert(name, expect=expect)

    def history(self, name: str, revision: str | None = None) -> list[dict[str, Any]]:
        """The revisions of an expert, from the current or another one back: revision, content, created, message."""
        card = self.card(name, revision)
        first = {key: getattr(card, key) for key in ("revision", "content", "created", "message")}
        return [first, *card.history]

    def copy_from(
        self,
        other: ExpertLibrary,
        names: Iterable[str] | None = None,
        where: Mapping[str, Any] | None = None,
        *,
        on_conflict: copying.OnConflict = "fail",
        dry_run: bool = False,
        message: str = "",
        readme: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Copied]:
        """Make the experts of `other`, or those of them that are named or kept by `where`, be here as they are there.

        What is equal costs nothing. Where both sides have other content and neither comes from the other, `on_conflict`
        says what is done: "fail" (Conflict, and nothing is written), "skip", "replace". `readme`: also bring the page
        about this library up to date. `progress` is told how many of how many experts are prepared. Returns what was
        done with each name, or with `dry_run` what would be.
        """
        told = {"message": message, "readme": readme, "progress": progress}
        return copying.copy(other, self, names, where, on_conflict=on_conflict, dry_run=dry_run, **told)

    def named(self, names: Iterable[str]) -> tuple[dict[str, Card], dict[str, Exception]]:
        """As `look`, of the experts with these names. Raises UnknownExpert if there is none of a name."""
        cards, problems = self.look()
        wanted = list(dict.fromkeys(names))
        for name in wanted:
            if name not in cards and name not in problems:
                raise UnknownExpert(f"{self.url}: {unknown('expert', name, {*cards, *problems})}")
        return {n: cards[n] for n in wanted if n in cards}, {n: problems[n] for n in wanted if n in problems}

    def diff(self, other: ExpertLibrary) -> list[copying.Difference]:
        """In what the two libraries differ, by name; no weights are read."""
        return copying.differences(sound_cards(self), sound_cards(other))

    def verify(self, names: Iterable[str] | None = None, *, quick: bool = False) -> Iterator[Problem | str]:
        """Check every file against its card, every card against the schema, and what else lies there.

        Yields, as it goes, the name of each sound expert and a Problem for all else. `quick` looks at sizes only.
        Without `quick` the weights are also parsed and compared with the card's summary.
        """
        return verifying.verify(self.backend, names, quick=quick)

    def gc(self, older_than: str = "7d", keep: int = 3, *, dry_run: bool = True) -> list[Garbage]:
        """What nothing needs any more, and is older than `older_than` (7d, 12h, 30m): taken away unless `dry_run`.

        Of each name `keep` old revisions stay. Artefacts go when what they were computed from is gone.
        """
        if not dry_run:
            self._may_write()
        return collecting.collect(self, older_than, keep, dry_run=dry_run)

    def artefact(
        self,
        names: str | Iterable[str],
        kind: str,
        config: Mapping[str, Any] | None = None,
        compute: Callable[[], artefacts.Value] | None = None,
        *,
        code: int = 1,
        backbone: str | None = None,
        data: str | None = None,
    ) -> artefacts.Value:
        """What was computed from an expert (or several, in any order): stored beside them, by the digest of its making.

        If it is not there `compute` makes it, tensors by name or plain data for JSON, and it is stored; without
        `compute` UnknownExpert is raised. `code` is a number that is raised when the mathematics changes, `backbone`
        and `data` are digests of what else was used. A library that cannot be written keeps it in `cache_dir`.
        """
        making = artefacts.Making(kind, code, dict(config or {}), artefacts.contents(self, names), backbone, data)
        return artefacts.get(self, making, compute)

    def artefacts(self, name: str | None = None, kind: str | None = None) -> list[artefacts.Stored]:
        """The artefacts that are stored, of one expert or of all, of exactly this kind or of all."""
        return artefacts.stored(self, name, kind)

    def remove_artefacts(self, rows: Iterable[artefacts.Stored]) -> None:
        """Take artefacts away that `artefacts` has told of."""
        self._may_write()
        artefacts.remove(self, rows)

    def scores(self, name: str) -> tuple[dict[str, Any], ...]:
        """The rows of scores in an expert's card."""
        return self.card(name).scores

    def add_score(self, name: str, row: Mapping[str, Any], *, expect: str | None = None) -> Card:
        """Put a row of scores into the card, in the place of one of the same metric, task, split and config."""
        card = self.card(name)
        return self.edit_card(name, expect=expect or card.revision, scores=with_score(card.scores, row))

    def best(self, task: str | None = None, *, metric: str, **group: Any) -> Best:
        """The expert with the best score for a task, among rows of the same metric, split and config.

        `split=` and `config=` choose where there are several such groups. Raises LibraryError if they are needed, or if
        no expert has such a row.
        """
        return best_of(sound_cards(self), task, metric, **group)

    def expected(self, name: str, expect: str | None) -> tuple[Card, str]:
        """The card and the version that a write has to find. Raises Conflict if another revision is there."""
        try:
            card, version = self.backend.card(name)
        except Damaged as error:
            raise Damaged(f"{error}; {way_out(self.url, name)}") from error
        wanted = expect or self._seen.get(name) or card.revision
        if len(wanted) < 8 or not card.revision.startswith(wanted):
            raise Conflict(
                f"{self.url}/{name} is at revision {card.revision[:8]}, expected was {shown(wanted[:8])}; "
                "look at it (mole library show) and say expect=<that revision> to go on",
                card.revision,
            )
        return card, version

    def saw(self, name: str, card: Card | None) -> None:
        """Remember which revision was read or written last; None: the name is gone."""
        if card is None:
            self._seen.pop(name, None)
        else:
            self._seen[name] = card.revision

    def wrote(self, head: str, cards: Mapping[str, Card | None]) -> None:
        """Remember what a batch has written, at the head that it has made."""
        self._cards.wrote(head, cards)

    def taken(self, name: str, revision: str | None) -> Conflict:
        """The error for a name that is not free."""
        at = f" (revision {revision[:8]})" if revision else ""
        return Conflict(
            f"expert {name!r} is taken in {self.url}{at}; choose another name (name=…), replace it with update_expert, "
            f"or remove it first: mole library remove {self.url} {name}",
            revision,
        )

    def _may_write(self) -> None:
        if self.read_only:
            raise ReadOnly(f"{self.url} was opened read-only")
