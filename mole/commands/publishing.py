"""What a training run does with its expert: a new name in a library, or the next revision of the one it starts from.

The next revision is published only if nobody else did meanwhile; the revision that the run started from is kept in its
run.json, so that a run which is resumed days later still knows what it may replace.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole.commands.library.opening import library_of
from mole.experts import Card, Conflict, Expert, ExpertLibrary, LibraryError, UnknownExpert, licences
from mole.experts.address import library_path, split_expert
from mole.run_folder import RunFolder

logger = logging.getLogger(__name__)
MOST_SCORES, MOST_ROWS = 200, 64  # what a card holds
UNNAMED = "expert"  # the name of an expert that was given none


@dataclass(frozen=True)
class Goal:
    """Where the expert goes: `library` and `name`; `base` is the expert whose next revision it becomes, if any."""

    library: ExpertLibrary
    name: str
    base: Expert | None = None


def goal(config: Any, run: RunFolder) -> Goal | None:
    """Where the expert of this run goes; None: it stays in the run's folder.

    A name that is taken, and a base that is not the newest revision, are found before hours of training. Raises
    LibraryError.
    """
    if config.library is None:
        return None
    library = library_of(config.library)
    name = _continued(config)
    if name is None:
        if config.publish != "always":
            raise LibraryError(
                f"publish={config.publish} compares with the expert that is trained further: give "
                "expert=<library>/<name> of the library that it goes to, or say publish=always"
            )
        if config.run.resume == "never":
            library.check_free(config.name)
        return Goal(library, config.name)
    return Goal(library, name, _base(config, run, library, name))


def _continued(config: Any) -> str | None:
    """The name in the library whose next revision this run makes; None: it makes a new expert."""
    if config.expert is None or ("://" not in config.expert and _is_plain_folder(config.expert)):
        return None
    address, name, _ = split_expert(config.expert)
    if not _same(address, config.library.url) or config.name not in (UNNAMED, name):
        return None
    return name


def _is_plain_folder(place: str) -> bool:
    """An expert's folder that is in no library."""
    path = Path(place).expanduser()
    return path.is_dir() and not (path.parent / ".mole").is_dir()


def _same(one: str, other: str) -> bool:
    return _normal(one) == _normal(other)


def _normal(address: str) -> str:
    elsewhere = "://" in address and not address.startswith("file://")
    return address.rstrip("/") if elsewhere else str(library_path(address).resolve())


def _base(config: Any, run: RunFolder, library: ExpertLibrary, name: str) -> Expert:
    """The expert at the revision that the run starts from: the one in run.json, if it is resumed."""
    started = run.facts().get("start", {}) if config.run.resume == "auto" else {}
    revision = started.get("revision") or split_expert(config.expert)[2]
    expert = library.get_expert(name, revision)
    current = library.card(name).revision
    if not started and current != expert.revision:
        raise Conflict(
            f"{library.url}/{name} is at revision {current[:8]}, and only the newest can be followed by another: start "
            f"from {name}, or keep the result of {expert.revision[:8]} under another name (name=…)",
            current,
        )
    return expert


def begin(target: Goal | None, run: RunFolder) -> None:
    """Notes in run.json which revision this run may replace."""
    if target is not None and target.base is not None:
        run.update(start={"name": target.name, "revision": target.base.revision})


def following(expert: Expert, target: Goal | None, message: str) -> Expert:
    """The expert with the card that it is published under: of the next revision, where it is one."""
    if target is None or target.base is None:
        return expert.with_card(expert.card.edited(message=message)) if message else expert
    base = target.base.card
    facts = {
        "tasks": _joined(base.tasks, expert.card.tasks),
        "tags": expert.card.tags or base.tags,
        "description": expert.card.description or base.description,
        "author": base.author,
        "head": base.head,
        "extra": {**base.extra, **expert.card.extra},
        "data": _rows(expert.card.data, base.data),
        "derived_from": [row for row in base.derived_from if row["relation"] != "continued"][:255]
        + list(expert.card.derived_from),
        "scores": scores_after(expert.card.scores, base),
    }
    return expert.with_card(expert.card.edited(**facts).next_after(base, message))


def _joined(one: tuple[str, ...], other: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys([*one, *other]))[:MOST_ROWS]


def _rows(new: tuple[dict[str, Any], ...], old: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    return [*new, *(row for row in old if row not in new)][:MOST_ROWS]


def scores_after(new: tuple[dict[str, Any], ...], base: Card) -> list[dict[str, Any]]:
    """The new scores first, then those that `base` had: theirs is its revision as `config`, they are of its weights."""
    earlier = {row["revision"][:16] for row in base.history}
    old = [row if row["config"] in earlier else {**row, "config": base.revision[:16]} for row in base.scores]
    return [*new, *old][:MOST_SCORES]


def license_of(config: Any, parents: dict[str, Expert]) -> dict[str, Any]:
    """The licence that was given, else what follows from those of the experts that the run started from."""
    if config.license is not None or not parents:
        return {"license": config.license}
    return licences.facts({name: expert.card.license for name, expert in parents.items()})


def publish(target: Goal | None, expert: Expert, run: RunFolder, *, against: str | None = None) -> None:
    """Publishes the expert, unless it is there already or there is a reason `against` it.

    Raises Conflict, with the two ways on, if somebody published another revision since the run began.
    """
    if target is None or _is_there(target, expert):
        return
    library, name = target.library, target.name
    if target.base is None:
        library.add_expert(expert, expert_name=name)
        return
    if against is not None:
        logger.warning("not published: %s; what was trained is in %s", against, run.expert)
        run.update(published=False)
        return
    try:
        card = library.update_expert(name, expert, expect=target.base.revision, message=expert.card.message)
    except (Conflict, UnknownExpert) as error:
        theirs = getattr(error, "revision", None)
        ways = [f"mole library add {library.url} {run.expert} name=<another> keeps both"]
        if theirs:
            ways.append(f"mole library update {library.url} {name} {run.expert} expect={theirs[:8]} replaces theirs")
        raise Conflict(
            f"{library.url}/{name} was changed by somebody else since this run began"
            + (f" (it is at revision {theirs[:8]})" if theirs else " (it is gone)")
            + f"; nothing was lost: {'; '.join(ways)}",
            theirs,
        ) from error
    logger.info("published %s/%s, revision %s after %s", library.url, name, card.revision[:8], card.parent[:8])  # type: ignore[index]


def _is_there(target: Goal, expert: Expert) -> bool:
    """Whether a run that is resumed after it was killed at its very end has published its expert already."""
    library, name = target.library, target.name
    return library.exists() and name in library and library.card(name).content == expert.card.content
