"""The card of an artefact: what was computed, by what, from which experts' content; its digests, as an expert's card.

An artefact is found by what made it: `<content, 16 hex>.<kind>.<key, 16 hex>`, or `library.<kind>.<key>` if it was made
from several experts. The key is the digest of everything that went into it, so another code number, another backbone
or another weight gives another artefact, and a new tag of the expert does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mole.experts.card import MAX_CARD_BYTES, digest_of
from mole.experts.schema import DIGEST, FieldError, check_format, fail, mapping, optional, pattern, record, rows, whole
from mole.untrusted import Damaged, LibraryError, shown, strict_json

ARTEFACT_FILE = "artefact.json"
DATA_FILES = ("data.safetensors", "data.json")
MAX_EXPERTS = 2_500  # their digests alone fill most of a card

_KIND = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,30}[a-z0-9])?", re.ASCII)
_NAME = re.compile(rf"(?:[0-9a-f]{{16}}|library)\.(?:{_KIND.pattern})\.[0-9a-f]{{16}}", re.ASCII)
_MADE_FROM = ("kind", "code", "config", "experts", "backbone", "data")


def _config(value: Any) -> None:
    if not isinstance(value, dict):
        fail("an object", value)


_FIELDS = {
    "format": lambda value: None,
    "kind": pattern(_KIND, "a kind: small letters, digits, '_', '-', at most 32"),
    "code": whole,
    "config": _config,
    "experts": rows(DIGEST, MAX_EXPERTS, 1),
    "backbone": optional(DIGEST),
    "data": optional(DIGEST),
    "files": mapping(re.compile("|".join(map(re.escape, DATA_FILES))), record({"size": whole, "sha256": DIGEST}), 1),
    "content": DIGEST,
    "revision": DIGEST,
}
_RECORD = record(_FIELDS)


@dataclass(frozen=True)
class ArtefactCard:
    """A checked card of an artefact. `experts` are contents, sorted; `backbone` and `data` digests, if they were used.

    Nested parts are plain data and belong to the card: they are not to be changed.
    """

    kind: str
    code: int
    config: dict[str, Any]
    experts: tuple[str, ...]
    backbone: str | None
    data: str | None
    files: dict[str, dict[str, Any]]
    content: str
    revision: str
    format: int = 1

    @property
    def key(self) -> str:
        """The digest of all that the artefact was made from."""
        return digest_of({name: self.to_dict()[name] for name in _MADE_FROM})

    @property
    def name(self) -> str:
        """The name that the artefact has in a library, and no other."""
        return artefact_name(self.kind, self.experts, self.key)

    @property
    def size(self) -> int:
        """Bytes of its file."""
        return sum(row["size"] for row in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """The card as plain data."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def to_bytes(self) -> bytes:
        """The card's file."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def artefact_key(
    kind: str,
    code: int,
    config: Mapping[str, Any],
    experts: Sequence[str],
    *,
    backbone: str | None = None,
    data: str | None = None,
) -> str:
    """The key of the artefact of a kind that `code` (the number of its mathematics) makes of these contents."""
    values = (kind, code, dict(config), sorted(experts), backbone, data)
    return digest_of(dict(zip(_MADE_FROM, values, strict=True)))


def artefact_name(kind: str, experts: Sequence[str], key: str) -> str:
    """The name of an artefact: by its expert's content if there is one, by `library` if there are several."""
    return f"{experts[0][:16] if len(experts) == 1 else 'library'}.{kind}.{key[:16]}"


def new_artefact(
    kind: str,
    code: int,
    config: Mapping[str, Any],
    experts: Sequence[str],
    files: Mapping[str, dict[str, Any]],
    *,
    backbone: str | None = None,
    data: str | None = None,
) -> ArtefactCard:
    """The card of an artefact whose one file is known by size and sha256. Raises LibraryError for what cannot be."""
    card: dict[str, Any] = {
        "format": 1,
        "kind": kind,
        "code": code,
        "config": dict(config),
        "experts": sorted(experts),
        "backbone": backbone,
        "data": data,
        "files": {name: dict(row) for name, row in files.items()},
    }
    try:
        card["content"] = digest_of(card["files"])
        card["revision"] = digest_of(card)
        _check(card)
        sealed = _from_dict(json.loads(json.dumps(card)))
    except (FieldError, TypeError, ValueError) as error:
        raise LibraryError(f"artefact: {error}") from None
    if len(sealed.to_bytes()) > MAX_CARD_BYTES:
        raise LibraryError(f"artefact: a card of more than {MAX_CARD_BYTES:,} bytes; give the digest of a large config")
    return sealed


def parse_artefact(data: bytes, what: str) -> ArtefactCard:
    """The card in the bytes of its file, checked to the last field and digest. Raises Damaged, naming `what`."""
    given = strict_json(data, what, max_bytes=MAX_CARD_BYTES)
    try:
        _check(given)
    except FieldError as error:
        raise Damaged(f"{what}: {error}") from None
    if given["content"] != digest_of(given["files"]):
        raise Damaged(f"{what}: content is not the digest of files: the card was changed")
    if given["revision"] != digest_of({key: value for key, value in given.items() if key != "revision"}):
        raise Damaged(f"{what}: revision is not the digest of the card: the card was changed")
    return _from_dict(given)


def is_artefact_name(name: object) -> bool:
    """Whether `name` can be an artefact's."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name))


def check_artefact_name(name: str) -> str:
    """The name, if it can be an artefact's. Raises LibraryError."""
    if is_artefact_name(name):
        return name
    raise LibraryError(
        f"{shown(name)} cannot be an artefact's name: <16 hexadecimal digits of a content, or library>.<kind>."
        "<16 hexadecimal digits of a key>"
    )


def _check(card: Any) -> None:
    check_format(card)
    _RECORD(card)
    if card["experts"] != sorted(set(card["experts"])):
        raise FieldError("experts: must be sorted, none of them twice")
    if not card["files"]:
        raise FieldError(f"files: one of {', '.join(DATA_FILES)} is wanted")


def _from_dict(card: dict[str, Any]) -> ArtefactCard:
    return ArtefactCard(**{**card, "experts": tuple(card["experts"])})
