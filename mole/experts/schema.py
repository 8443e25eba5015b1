"""What each field of a card may hold: small checks, put together to the closed schema of format 1."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from mole.untrusted import shown

Check = Callable[[Any], None]

CARD_FILE = "expert.json"
README_FILE = "README.md"
KINDS = ("adapter", "mixture")
DTYPES = ("float32", "float16", "bfloat16", "float64")
RELATIONS = ("continued", "merged", "converted", "imported", "copied")
HEADS = ("classification", "regression", "tokens", "question_answering")

_BEYOND = 2**63
_CLOCKS = timedelta(days=2)
_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}", re.ASCII)
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", re.ASCII)
_MODULE = re.compile(r"[A-Za-z0-9_.]{1,300}", re.ASCII)
_FILES = {
    "adapter": re.compile(r"adapter_config\.json|mole_adapter\.json|adapter_model\.safetensors", re.ASCII),
    "mixture": re.compile(r"mixture\.json|router\.safetensors|expert-[0-9]{3}\.(?:json|safetensors)", re.ASCII),
}


class FieldError(ValueError):
    """A field of a card holds what it may not hold. `path` leads to it: steps such as `.adapter` and `[3]`.

    A check knows no path: the ones around it put their steps in front, and only when something is wrong.
    """

    def __init__(self, problem: str, path: str = ""):
        super().__init__(f"{path.removeprefix('.')}: {problem}" if path else problem)
        self.problem = problem
        self.path = path

    def under(self, step: str) -> FieldError:
        """The same error as the value around sees it."""
        return FieldError(self.problem, step + self.path)

    def __reduce__(self):
        return type(self), (self.problem, self.path)


def fail(wanted: str, value: Any) -> None:
    """Raise FieldError."""
    raise FieldError(f"must be {wanted}, got {shown(value)}")


def is_clean(text: str) -> bool:
    """Whether text is free of control characters and of those that turn the direction of writing."""
    if text.isascii():
        return text.isprintable()
    return not any(unicodedata.category(c) in ("Cc", "Cs") or unicodedata.bidirectional(c) in _BIDI for c in text)


def looks_like_path(text: str) -> bool:
    """Whether text would tell where files lie on somebody's machine."""
    return text.startswith(("/", "~", "./", "../", "file:")) or "\\" in text or bool(re.match(r"[A-Za-z]:", text))


def text(cap: int, *, empty: bool = False, path: bool = True) -> Check:
    """Text of at most `cap` characters; `empty`, `path`: whether it may be empty, or look like a path."""

    def check(value: Any) -> None:
        if not isinstance(value, str) or len(value) > cap or not (value or empty) or not is_clean(value):
            fail(f"text of {0 if empty else 1} to {cap:,} characters without control characters", value)
        if not path and looks_like_path(value):
            fail("a name, not a path", value)

    return check


def pattern(expression: re.Pattern[str], wanted: str) -> Check:
    fits = expression.fullmatch

    def check(value: Any) -> None:
        if not isinstance(value, str) or not fits(value):
            fail(wanted, value)

    return check


def hexadecimal(least: int, most: int) -> Check:
    wanted = f"{least} small hexadecimal digits" if least == most else f"{least} to {most} small hexadecimal digits"
    return pattern(re.compile(rf"[0-9a-f]{{{least},{most}}}", re.ASCII), wanted)


def whole(value: Any) -> None:
    if type(value) is not int or not 0 <= value < _BEYOND:
        fail("a whole number from 0", value)


def number(value: Any) -> None:
    """A finite number; whole ones within 64 bits, as everything that is read."""
    if type(value) is not float and (type(value) is not int or not -_BEYOND <= value < _BEYOND):
        fail("a finite number", value)
    if not math.isfinite(value):
        fail("a finite number", value)


def flag(value: Any) -> None:
    if type(value) is not bool:
        fail("true or false", value)


def one_of(*known: str) -> Check:
    def check(value: Any) -> None:
        if value not in known or not isinstance(value, str):
            fail(f"one of {', '.join(known)}", value)

    return check


def moment(value: Any) -> None:
    """UTC to the second, and not in the future (by more than two days: clocks are wrong)."""
    try:
        then = datetime.fromisoformat(value) if _MOMENT.fullmatch(value) else None
    except (TypeError, ValueError):
        then = None
    if then is None:
        return fail("a time such as 2026-01-31T12:00:00Z", value)
    if then > datetime.now(UTC) + _CLOCKS:
        fail("a time that has been", value)
    return None


def optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def rows(check: Check, cap: int, least: int = 0) -> Check:
    """A list of `least` to `cap` values that each pass `check`."""

    def check_all(value: Any) -> None:
        if not isinstance(value, list) or not least <= len(value) <= cap:
            return fail(f"a list of {least} to {cap:,}", value)
        place = 0
        try:
            for place, item in enumerate(value):  # noqa: B007  (named in the error)
                check(item)
        except FieldError as error:
            raise error.under(f"[{place}]") from None
        return None

    return check_all


def record(fields: Mapping[str, Check]) -> Check:
    """An object with exactly these fields."""
    names, checks = fields.keys(), tuple(fields.items())

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            return fail("an object", value)
        if value.keys() != names:
            _other_fields(value, names)
        name = ""
        try:
            for name, one in checks:
                one(value[name])
        except FieldError as error:
            raise error.under(f".{name}") from None
        return None

    return check


def _other_fields(value: dict[str, Any], names: Collection[str]) -> None:
    for name in value:
        if name not in names:
            raise FieldError(f"unknown field (known: {', '.join(names)})", f".{shown(name)[1:-1]}")
    missing = next(name for name in names if name not in value)
    raise FieldError("missing", f".{missing}")


def mapping(key: re.Pattern[str], check: Check, cap: int) -> Check:
    """An object of at most `cap` entries, keys by `key`, values by `check`."""
    fits = key.fullmatch

    def check_all(value: Any) -> None:
        if not isinstance(value, dict) or len(value) > cap:
            return fail(f"an object of at most {cap} entries", value)
        for name in value:
            if not isinstance(name, str) or not fits(name):
                raise FieldError(f"{shown(name)} is not a valid key")
        name = ""
        try:
            for name, item in value.items():  # noqa: B007  (named in the error)
                check(item)
        except FieldError as error:
            raise error.under(f".{name}") from None
        return None

    return check_all


def scalar(*, path: bool) -> Check:
    short = text(200, empty=True, path=path)

    def check(value: Any) -> None:
        if isinstance(value, str):
            return short(value)
        return None if isinstance(value, bool) else number(value)

    return check


DIGEST = hexadecimal(64, 64)
_ADAPTER = {
    "method": pattern(_SLUG, "a method's name"),
    "rank": optional(whole),
    "alpha": optional(number),
    "targets": rows(pattern(_MODULE, "a module's name"), 1000),
    "full_modules": rows(pattern(_MODULE, "a module's name"), 1000),
    "parameters": whole,
    "dtype": one_of(*DTYPES),
}
_BACKBONE = {"name": text(200, path=False), "revision": optional(hexadecimal(7, 64)), "shapes": optional(DIGEST)}
_HEAD = {"type": one_of(*HEADS), "labels": rows(text(100), 1000)}
_DATA = {
    "name": text(200, path=False),
    "split": optional(text(100)),
    "examples": optional(whole),
    "sha256": optional(DIGEST),
}
_SCORE = {
    "metric": text(100),
    "value": number,
    "task": optional(text(100)),
    "dataset": optional(text(200, path=False)),
    "split": optional(text(100)),
    "examples": optional(whole),
    "higher_is_better": flag,
    "config": optional(hexadecimal(4, 64)),
}
_HISTORY = {"revision": DIGEST, "content": DIGEST, "created": moment, "message": text(500, empty=True)}
_ORIGIN = {
    "relation": one_of(*RELATIONS),
    "source": optional(text(200, path=False)),
    "name": optional(text(200, path=False)),
    "revision": optional(hexadecimal(7, 64)),
    "content": optional(DIGEST),
}
FIELDS: dict[str, Check] = {
    "format": lambda value: None,
    "kind": one_of(*KINDS),
    "adapter": optional(record(_ADAPTER)),
    "backbone": record(_BACKBONE),
    "head": optional(record(_HEAD)),
    "tasks": rows(text(100), 64),
    "tags": rows(pattern(_SLUG, "a tag: small letters, digits, '.', '_', '-'"), 64),
    "description": text(4000, empty=True),
    "license": optional(pattern(_LICENSE, "an SPDX licence id, other or null")),
    "author": optional(text(100)),
    "data": rows(record(_DATA), 64),
    "training": mapping(_KEY, scalar(path=False), 64),
    "scores": rows(record(_SCORE), 200),
    "created": moment,
    "producer": mapping(_KEY, text(100), 16),
    "message": text(500, empty=True),
    "parent": optional(DIGEST),
    "derived_from": rows(record(_ORIGIN), 256),
    "history": rows(record(_HISTORY), 100),
    "extra": mapping(_KEY, scalar(path=True), 32),
    "files": mapping(
        re.compile(r"[a-z0-9_-]{1,64}\.(?:json|safetensors)"), record({"size": whole, "sha256": DIGEST}), 64
    ),
    "content": DIGEST,
    "revision": DIGEST,
}


_CARD = record(FIELDS)


def check_format(card: Any) -> None:
    """Raise FieldError unless `card` is an object of format 1."""
    if not isinstance(card, dict):
        raise FieldError(f"must be an object, got {shown(card)}", ".card")
    found = card.get("format")
    if type(found) is not int or found < 1:
        raise FieldError(f"must be 1, got {shown(found)}", ".format")
    if found > 1:
        raise FieldError(f"{shown(found)}; this mole knows format 1: it needs a newer mole", ".format")


def check_card(card: Any) -> None:
    """Raise FieldError unless `card`, plain data, is of format 1 and each field holds what it may hold."""
    check_format(card)
    _CARD(card)
    if (card["kind"] == "adapter") != (card["adapter"] is not None):
        raise FieldError("adapter: wanted for kind adapter, and for no other")
    check_files(card["kind"], list(card["files"]))
    rows_of = [row["revision"] for row in card["history"]]
    if card["parent"] != (rows_of[0] if rows_of else None) or len(set(rows_of)) != len(rows_of):
        raise FieldError("parent: must be the newest revision in history, none of them twice")


def check_files(kind: str, names: list[str]) -> None:
    """Raise FieldError unless these files, and no others, can make an expert of that kind."""
    for name in names:
        if not _FILES[kind].fullmatch(name):
            raise FieldError(f"files: {shown(name)} does not belong to an expert of kind {kind}")
    if kind == "mixture":
        needed = {"mixture.json"}
    else:
        needed = {"adapter_model.safetensors"}
        if len({"adapter_config.json", "mole_adapter.json"} & set(names)) != 1:
            raise FieldError("files: exactly one of adapter_config.json and mole_adapter.json is wanted")
    if missing := sorted(needed - set(names)):
        raise FieldError(f"files: {missing[0]} is missing")
