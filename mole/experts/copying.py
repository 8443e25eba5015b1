"""Copies between libraries: revisions of two listings are compared, and what differs is carried over in batches."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mole.experts import artefacts, library_readme
from mole.experts.backends import Backend, LocalBackend
from mole.experts.card import Card
from mole.experts.damage import damage, sound_cards, way_out
from mole.experts.errors import Conflict, Damaged, LibraryError, NoLibrary, UnknownExpert
from mole.experts.filters import keep

if TYPE_CHECKING:
    from mole.experts.library import ExpertLibrary

OnConflict = Literal["fail", "skip", "replace"]
Action = Literal["add", "update", "edit", "replace", "repair", "equal", "skip"]
WRITTEN = ("add", "update", "edit", "replace", "repair")
_BATCH = 200  # experts in one batch, and so on the disk at a time
_OPERATIONS = 2_000  # files in one batch
_OWN = ("revision", "content", "files", "parent", "history", "created", "message", "producer")


@dataclass(frozen=True)
class Copied:
    """What is done with one name: the card that is copied, the one that was there, and what that makes it."""

    name: str
    action: Action
    card: Card
    there: Card | None


@dataclass(frozen=True)
class Difference:
    """In what two libraries differ at one name: it is only on one side, or its content, or only its card differs.

    `fields` are those of the card that differ, beside digests, dates and history.
    """

    name: str
    kind: Literal["only here", "only there", "content", "card"]
    fields: tuple[str, ...] = ()


def differences(here: Mapping[str, Card], there: Mapping[str, Card]) -> list[Difference]:
    """Where the cards of two libraries differ, in the order of names."""
    found = []
    for name in sorted({*here, *there}):
        one, other = here.get(name), there.get(name)
        if one is None or other is None:
            found.append(Difference(name, "only here" if other is None else "only there"))
        elif one.revision != other.revision:
            kind = "card" if one.content == other.content else "content"
            found.append(Difference(name, kind, changed_fields(one, other)))
    return found


def changed_fields(one: Card, other: Card) -> tuple[str, ...]:
    """The fields in which two cards differ, beside digests, dates and history."""
    first, second = one.to_dict(), other.to_dict()
    return tuple(key for key in first if key not in _OWN and first[key] != second[key])


def cards_there(library: ExpertLibrary) -> dict[str, Card]:
    """The cards of a library that may be written; none if it does not exist yet. Raises Damaged."""
    try:
        return library.cards()
    except NoLibrary:
        return {}


def seen_there(library: ExpertLibrary) -> tuple[dict[str, Card], set[str]]:
    """The sound cards of a library that may be written, and the names of the others; none if it does not exist yet."""
    try:
        cards, problems = library.look()
    except NoLibrary:
        return {}, set()
    return cards, set(problems)


def to_copy(source: ExpertLibrary, names: Iterable[str] | None) -> dict[str, Card]:
    """The cards of what is to be copied, all of which must be sound. Raises Damaged, UnknownExpert."""
    cards, problems = source.look() if names is None else source.named(names)
    for name, problem in sorted(problems.items()):
        raise Damaged(f"{problem}; copy the others with names=[…], or {way_out(source.url, name)}") from problem
    return cards


def with_repairs(steps: Sequence[Copied], target: ExpertLibrary, *, deep: bool) -> list[Copied]:
    """The steps, where what is equal by its card and has damaged files there is put there again.

    Elsewhere than in a folder that costs requests: it is looked for only if `deep`.
    """
    looks = deep or isinstance(target.backend, LocalBackend)
    return [
        Copied(step.name, "repair", step.card, step.there)
        if looks and step.action == "equal" and damage(target, step.name)
        else step
        for step in steps
    ]


def located(backend: Backend, name: str, revision: str) -> tuple[str, Card]:
    """The name under which an old revision lies, and its card. Raises UnknownExpert.

    A renamed expert's history tells revisions that were published under its old name.
    """
    try:
        return name, backend.card(name, revision)[0]
    except UnknownExpert as error:
        missing = error
    try:
        chain = [row["revision"] for row in backend.card(name)[0].history]
    except LibraryError:
        chain = []
    found = [one for one in chain if one.startswith(revision)]
    for bearer in backend.bearers(found[0]) if len(found) == 1 else ():
        if bearer != name:
            return bearer, backend.card(bearer, found[0])[0]
    raise missing


def plan(
    cards: Mapping[str, Card], there: Mapping[str, Card], on_conflict: OnConflict, damaged: Container[str] = ()
) -> list[Copied]:
    """What copying `cards` to where `there` is would do. Raises Conflict, naming all such experts, with "fail".

    An expert that comes from the one that is there (which stands in its history) is an update. One that the other side
    has gone on from is a conflict even if only the card differs: copying would take back what somebody did there.
    """
    if on_conflict not in ("fail", "skip", "replace"):
        raise LibraryError(f"on_conflict={on_conflict!r}: known are fail, skip, replace")
    done = [
        Copied(name, "replace" if name in damaged else _action(card, there.get(name)), card, there.get(name))
        for name, card in sorted(cards.items())
    ]
    if on_conflict == "replace":
        return done
    clashes = [step for step in done if step.action == "replace"]
    if clashes and on_conflict == "fail":
        told = ", ".join(f"{step.name} ({_why(step)})" for step in clashes[:20])
        raise Conflict(
            f"nothing was copied: {told}{' …' if len(clashes) > 20 else ''}; look at both (mole library diff), then "
            "say on_conflict=skip to leave these alone, or on_conflict=replace to put yours in their place",
            clashes[0].there.revision if clashes[0].there else None,
        )
    return [Copied(s.name, "skip", s.card, s.there) if s.action == "replace" else s for s in done]


def copy(
    source: ExpertLibrary,
    target: ExpertLibrary,
    names: Iterable[str] | None,
    where: Mapping[str, Any] | None,
    *,
    on_conflict: OnConflict,
    dry_run: bool,
    message: str,
    readme: bool,
    progress: Callable[[int, int], None] | None,
) -> list[Copied]:
    """See ExpertLibrary.copy_from."""
    cards = to_copy(source, names)
    chosen = keep(cards, where) if where else cards
    there, damaged = seen_there(target)
    steps = plan(chosen, there, on_conflict, damaged)
    if on_conflict == "replace":
        steps = with_repairs(steps, target, deep=names is not None)
    if any(step.action in WRITTEN for step in steps):
        target.check_writable()
    if not dry_run:
        after = {**there, **{step.name: step.card for step in steps if step.action in WRITTEN}}
        page = library_readme.page_for(target.backend, after) if readme and after != there else None
        carry_out(steps, source, target, message=message, readme=page, progress=progress)
    return steps


def carry_out(
    steps: Sequence[Copied],
    source: ExpertLibrary,
    target: ExpertLibrary,
    *,
    message: str = "",
    readme: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Copy what a plan says, in batches of whole experts; whoever changed one there meanwhile wins by Conflict.

    Files go through a folder of this machine and are verified on their way. If it is interrupted whole experts are
    there, and doing it again copies the rest.
    """
    work = [step for step in steps if step.action in WRITTEN]
    groups = list(_groups(work))
    done = 0
    for place, group in enumerate(groups):
        last = place == len(groups) - 1
        with target.batch(message, readme=readme if last else None) as batch:
            for step in group:
                batch.put(step.action, step.name, source.expert_of(step.name, step.card), step.there)
                done += 1
                if progress is not None:
                    progress(done, len(work))


def clone(
    source: ExpertLibrary,
    target: ExpertLibrary,
    *,
    history: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Copied]:
    """Copy all experts, and what was computed from them, into a new or empty library.

    With `history` the old revisions that the source still has come along, oldest first, each as it was. Raises Conflict
    if the target has experts.
    """
    cards = sound_cards(source)
    if there := cards_there(target):
        raise Conflict(f"{target.url} has {len(there)} experts; clone into a new or empty library, or use pull or push")
    steps = plan(cards, {}, "fail")
    target.check_writable()
    if dry_run:
        return steps
    newest = _copy_history(source, target, cards) if history else {}
    carry_out(
        [Copied(s.name, s.action, s.card, newest.get(s.name)) for s in steps],
        source,
        target,
        message=f"Clone {len(steps)} experts",
        progress=progress,
    )
    artefacts.copy(source, target)
    return steps


def _copy_history(source: ExpertLibrary, target: ExpertLibrary, cards: Mapping[str, Card]) -> dict[str, Card]:
    """Publish the old revisions, all names' oldest first, and give the newest of them by name."""
    chains = {
        name: [old for row in reversed(card.history) if (old := _old(source, name, row))]
        for name, card in cards.items()
    }
    newest: dict[str, Card] = {}
    for age in range(max(map(len, chains.values()), default=0)):
        steps = [
            Copied(name, "update" if name in newest else "add", chain[age], newest.get(name))
            for name, chain in chains.items()
            if age < len(chain)
        ]
        carry_out(steps, source, target, message="Clone old revisions")
        newest |= {step.name: step.card for step in steps}
    return newest


def _old(source: ExpertLibrary, name: str, row: Mapping[str, Any]) -> Card | None:
    """An old revision's card; None if the source has it no longer."""
    try:
        return source.backend.card(name, row["revision"])[0]
    except LibraryError:
        return None


def _action(card: Card, there: Card | None) -> Action:
    if there is None:
        return "add"
    if there.revision == card.revision:
        return "equal"
    if comes_from(card, there):
        return "edit" if card.content == there.content else "update"
    if comes_from(there, card):
        return "replace"
    return "edit" if card.content == there.content else "replace"


def comes_from(card: Card, other: Card) -> bool:
    """Whether `other` is an earlier revision of `card`."""
    return any(row["revision"] == other.revision for row in card.history)


def _why(step: Copied) -> str:
    if step.there is None:
        return "is damaged there"
    newer = "is newer there" if comes_from(step.there, step.card) else "was changed on both sides"
    return f"{newer}, revision {step.there.revision[:8]}"


def _groups(steps: Sequence[Copied]) -> Iterator[list[Copied]]:
    group: list[Copied] = []
    operations = 0
    for step in steps:
        size = len(step.card.files) + 2
        if group and (len(group) == _BATCH or operations + size > _OPERATIONS):
            yield group
            group, operations = [], 0
        group.append(step)
        operations += size
    if group:
        yield group
