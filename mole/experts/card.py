"""The card of an expert: what it is, what it was made from, and the digests that make it one revision.

`content` is the digest of the files, `revision` of the whole card. Two, because a new tag must not make what was
computed from the weights stale, and a changed tag must not be overwritten by someone who has not seen it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mole import __version__
from mole.experts.schema import CARD_FILE, README_FILE, FieldError, check_card
from mole.registry import unknown
from mole.untrusted import Damaged, LibraryError, strict_json

T = TypeVar("T")

MAX_CARD_BYTES = 256 << 10
MAX_HISTORY = 100


class BackboneFacts(Protocol):
    """What a card needs to know of a backbone; a loaded backbone has it."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def shapes(self) -> str | None: ...


@dataclass(frozen=True)
class BackboneRef:
    """Which backbone: `name` is a Hub id or a label, never a path; `shapes` the digest over its parameters' shapes."""

    name: str
    revision: str | None = None
    shapes: str | None = None


@dataclass(frozen=True)
class Card:
    """A checked card. Nested parts are plain data and belong to the card: they are not to be changed."""

    kind: str
    adapter: dict[str, Any] | None
    backbone: BackboneRef
    head: dict[str, Any] | None
    tasks: tuple[str, ...]
    tags: tuple[str, ...]
    description: str
    license: str | None
    author: str | None
    data: tuple[dict[str, Any], ...]
    training: dict[str, Any]
    scores: tuple[dict[str, Any], ...]
    created: str
    producer: dict[str, str]
    message: str
    parent: str | None
    derived_from: tuple[dict[str, Any], ...]
    history: tuple[dict[str, Any], ...]
    extra: dict[str, Any]
    files: dict[str, dict[str, Any]]
    content: str
    revision: str
    format: int = 1

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(row["size"] for row in self.files.values())

    @property
    def is_merged(self) -> bool:
        """Whether it was made of other experts by a merge."""
        return any(row["relation"] == "merged" for row in self.derived_from)

    def to_dict(self) -> dict[str, Any]:
        """The card as plain data, as it stands in its file."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def to_bytes(self) -> bytes:
        """The card's file."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"

    def edited(self, **changes: Any) -> Card:
        """This card with other facts, as a revision of its own. Raises LibraryError for what a field may not hold."""
        return _sealed({**self.to_dict(), **_plain(changes)})

    def next_after(self, current: Card, message: str) -> Card:
        """This card as the revision that follows `current` under the same name."""
        row = {key: getattr(current, key) for key in ("revision", "content", "created", "message")}
        history = [row, *(old for old in current.history if old["revision"] != row["revision"])]
        return self.edited(message=message, parent=current.revision, history=history[:MAX_HISTORY])


_ROWS = tuple(field.name for field in fields(Card) if str(field.type).startswith("tuple"))
_FACTS = {  # what the maker of a card may say; the other fields follow from the files
    "head": None,
    "tasks": [],
    "tags": [],
    "description": "",
    "license": None,
    "author": None,
    "data": [],
    "training": {},
    "scores": [],
    "message": "",
    "derived_from": [],
    "extra": {},
}


def new_card(
    files: Mapping[str, dict[str, Any]],
    backbone: BackboneFacts,
    *,
    kind: str = "adapter",
    adapter: dict[str, Any] | None = None,
    **facts: Any,
) -> Card:
    """The card of files that are known by size and sha256.

    `adapter` is the summary, for kind adapter. `facts` are head, tasks, tags, description, license, author, data,
    training, scores, message, derived_from, extra; and created, if it is not now. Raises LibraryError for a fact that
    is unknown or that its field may not hold.
    """
    for name in facts:
        if name not in _FACTS and name != "created":
            raise LibraryError(unknown("fact of a card", name, _FACTS))
    return _sealed(
        {
            "format": 1,
            "kind": kind,
            "adapter": adapter,
            "parent": None,
            "history": [],
            "backbone": {"name": backbone.name, "revision": backbone.revision, "shapes": backbone.shapes},
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "producer": {"mole": __version__} | {name: found for name in ("torch",) if (found := _version(name))},
            **_FACTS,
            **_plain(facts),
            "files": {name: dict(row) for name, row in sorted(files.items())},
        }
    )


def make_card(folder: str | Path, backbone: BackboneFacts, **facts: Any) -> Card:
    """The card of the files in `folder`, its card and README left out; `kind` and facts as for `new_card`."""
    names = sorted(entry.name for entry in Path(folder).iterdir() if entry.name not in (CARD_FILE, README_FILE))
    return new_card({name: file_facts(Path(folder) / name) for name in names}, backbone, **facts)


def parse_card(data: bytes, what: str) -> Card:
    """The card in the bytes of its file, checked to the last field and digest; `what` names it in errors.

    Raises Damaged.
    """
    given = _plainly_sound(data)
    if given is None:
        given = strict_json(data, what, max_bytes=MAX_CARD_BYTES)
        try:
            check_card(given)
        except FieldError as error:
            raise Damaged(f"{what}: {error}") from None
        if given["content"] != digest_of(given["files"]):
            raise Damaged(f"{what}: content is not the digest of files: the card was changed")
        if given["revision"] != digest_of(_without_revision(given)):
            raise Damaged(f"{what}: revision is not the digest of the card: the card was changed")
    return known_card(given)


def _plainly_sound(data: bytes) -> dict[str, Any] | None:
    """The card in these bytes if it is sound beyond doubt; None if it has to be looked at closely, or is damaged.

    Here the parser looks at nothing: the closed schema has no place for deep, endless or large values. It would not see
    a key that stands twice, of which the parser keeps the last. Without escapes that shows: its text has a colon after
    each key, and whatever was dropped has one at least that the canonical text of the rest has not.
    """
    if len(data) > MAX_CARD_BYTES or b"\\" in data:
        return None
    try:
        given = json.loads(data.decode("utf-8"))
        check_card(given)
    except (ValueError, RecursionError):
        return None
    rest = canonical(_without_revision(given))
    is_sound = (
        given["revision"] == hashlib.sha256(rest).hexdigest()
        and given["content"] == digest_of(given["files"])
        and data.count(b":") == rest.count(b":") + 1  # that of the revision
    )
    return given if is_sound else None


def _without_revision(card: dict[str, Any]) -> dict[str, Any]:
    rest = dict(card)
    del rest["revision"]
    return rest


def check_backbone(card: Card, backbone_name: str, shapes: str | None, *, allow_other_backbone: bool = False) -> None:
    """Raise LibraryError, showing both, unless the card's expert was made for this backbone.

    Names have to be equal, and digests of the parameters' shapes where both are known. `allow_other_backbone` allows
    another name, never other shapes.
    """
    made_for = card.backbone
    same_shapes = None in (made_for.shapes, shapes) or made_for.shapes == shapes
    if same_shapes and (made_for.name == backbone_name or allow_other_backbone):
        return
    both = f"the expert was made for the backbone {_told(made_for.name, made_for.shapes)}"
    both += f", this one is {_told(backbone_name, shapes)}"
    if not same_shapes:
        raise LibraryError(f"{both}; their parameters have other shapes: choose the backbone that the expert is for")
    raise LibraryError(f"{both}; choose that backbone, or say allow_other_backbone=true")


def _told(name: str, shapes: str | None) -> str:
    return f"{name!r} (shapes {shapes[:8]})" if shapes else f"{name!r}"


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical(value: object) -> bytes:
    """Plain data in one form: sorted keys, no spaces, ASCII, Python's shortest floats."""
    return _CANONICAL.encode(value).encode()


def digest_of(value: object) -> str:
    """The sha256 of plain data in its canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def bytes_facts(data: bytes) -> dict[str, Any]:
    """Size and sha256 of a file's bytes."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sealed(card: dict[str, Any]) -> Card:
    """A card with its two digests, checked as if it had been read."""
    card["content"] = digest_of(card["files"])
    card.pop("revision", None)
    card["revision"] = digest_of(card)
    try:
        check_card(card)
    except FieldError as error:
        raise LibraryError(f"card: {error}") from None
    sealed = known_card(dict(card))
    if len(sealed.to_bytes()) > MAX_CARD_BYTES:
        raise LibraryError(f"card: more than {MAX_CARD_BYTES:,} bytes; shorten its texts or rows")
    return sealed


def known_card(card: dict[str, Any]) -> Card:
    """The card of plain data that was checked before; nothing is checked again, and `card` becomes part of it."""
    for name in _ROWS:
        card[name] = tuple(card[name])
    card["backbone"] = _holding(BackboneRef, card["backbone"])
    return _holding(Card, card)


def _holding(kind: type[T], fields: dict[str, Any]) -> T:
    """The dataclass whose fields are these: ten thousand are made, and one that is frozen sets each by a call."""
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", fields)
    return made


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples and dataclasses as JSON has them. Raises LibraryError for what JSON has not."""
    try:
        return json.loads(json.dumps(dict(facts), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise LibraryError(f"card: {error}") from None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
