"""The page about a library: a table of its experts between two marks, how to load them; the rest is its owner's.

It is written for people and for the Hub's search, and never read back for information.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from mole.experts.backends import Backend, LocalBackend
from mole.experts.card import Card
from mole.experts.damage import sound_cards
from mole.experts.errors import LibraryError, NoLibrary
from mole.experts.readme import escaped
from mole.experts.schema import README_FILE
from mole.untrusted import read_file

if TYPE_CHECKING:
    from mole.experts.library import ExpertLibrary

BEGIN, END = "<!-- mole:begin -->", "<!-- mole:end -->"
_FRONT_BEGIN, _FRONT_END = "# mole:begin", "# mole:end"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_MOST, _SHOWN = 500, 200
_MAX_BYTES = 1 << 20
_LICENSES = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"}
_LICENSES |= {"cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense"}
_KEY = re.compile(r"([A-Za-z_][\w-]*)\s*:", re.ASCII)


def library_readme(cards: Mapping[str, Card], address: str, before: str | None = None) -> str:
    """The page of a library with these experts; of the page `before` it, all text outside the marks is kept.

    `address` is what readers load it from.
    """
    front, body = _parted(before or "")
    ours = f"{BEGIN}\n{_table(cards, address)}\n{END}"
    begin, end = body.find(BEGIN), body.find(END)
    if 0 <= begin < end:
        body = f"{body[:begin]}{ours}{body[end + len(END) :]}"
    else:
        body = f"{body.rstrip()}\n\n{ours}\n" if body.strip() else f"# A library of experts\n\n{ours}\n"
    return f"---\n{_front_matter(cards, front)}---\n{body if body.startswith(chr(10)) else chr(10) + body}"


def has_page(backend: Backend) -> bool:
    """Whether the place shows a page about the library by itself: the Hub does, and takes it with the experts."""
    return backend.url.startswith("hf://")


def page_for(backend: Backend, cards: Mapping[str, Card]) -> str | None:
    """The page of a library that is about to have these experts; None where there are no pages."""
    if not has_page(backend):
        return None
    before = None
    with suppress(NoLibrary):  # it is made with its first expert
        before = backend.readme()
    return library_readme(cards, backend.url.partition("@")[0], before)


def write_page(library: ExpertLibrary, *, dry_run: bool = False) -> str:
    """Bring the page of a library on the Hub or in a folder up to date; gives its text.

    Raises LibraryError for a library elsewhere: nobody would see the page.
    """
    backend, cards = library.backend, sound_cards(library)
    if isinstance(backend, LocalBackend):
        file = backend.root / README_FILE
        before = read_file(file, _MAX_BYTES).decode("utf-8", "replace") if file.exists() else None
        text = library_readme(cards, "<this folder>", before)
        if not dry_run:
            library.check_writable()
            new = file.with_name(f"{README_FILE}-{uuid.uuid4().hex}")
            new.write_text(text, encoding="utf-8")
            os.replace(new, file)
        return text
    text = page_for(backend, cards)
    if text is None:
        raise LibraryError(f"{library.url}: there is no place for a page; only the Hub and folders have one")
    if not dry_run:
        with library.batch("Bring README.md up to date", readme=text):
            pass
    return text


def _parted(text: str) -> tuple[list[str], str]:
    """The lines of the front matter that are the owner's, and the text behind it."""
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[0].strip() != "---" or "---" not in (line.rstrip() for line in lines[1:]):
        return [], text
    end = next(place for place, line in enumerate(lines[1:], 1) if line.rstrip() == "---")
    kept, is_ours = [], False
    for line in lines[1:end]:
        is_ours = is_ours or line.strip() == _FRONT_BEGIN
        if not is_ours:
            kept.append(line)
        is_ours = is_ours and line.strip() != _FRONT_END
    return kept, "\n".join(lines[end + 1 :])


def _front_matter(cards: Mapping[str, Card], kept: list[str]) -> str:
    """Ours between marks, but for keys that the owner has set; then the owner's."""
    methods = sorted({card.adapter["method"] for card in cards.values() if card.adapter})
    ids = sorted({card.backbone.name for card in cards.values() if _HUB_ID.fullmatch(card.backbone.name)})
    values: dict[str, object] = {"library_name": "peft", "tags": ["mole", *methods]}
    if ids:
        values["base_model"] = ids
    licenses = {card.license for card in cards.values()}
    if len(licenses) == 1 and (license_id := next(iter(licenses))):
        values["license"] = license_id.lower() if license_id.lower() in _LICENSES else "other"
    taken = {match[1] for line in kept if (match := _KEY.match(line))}
    ours = [f"{key}: {json.dumps(value)}" for key, value in values.items() if key not in taken]
    return "".join(f"{line}\n" for line in (_FRONT_BEGIN, *ours, _FRONT_END, *kept))


def _table(cards: Mapping[str, Card], address: str) -> str:
    names = sorted(cards)
    shown = names if len(names) <= _MOST else names[:_SHOWN]
    lines = [
        "| name | tasks | adapter | backbone | score | size | revision |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(map(escaped, _cells(name, cards[name])))} |" for name in shown),
    ]
    if len(shown) < len(names):
        lines.append(f"\nThe first {len(shown)} of {len(names):,} experts.")
    lines += ["", "Load one in Python, or use it in a mixture:", "", "```python"]
    example = names[0] if names else "<name>"
    lines += ["from mole.experts import load_expert", "", f'expert = load_expert("{address}/{example}")', "```", ""]
    lines += ["```sh", f"mole library list {address}", f"mole build-moe library={address} router=uniform", "```"]
    return "\n".join(lines)


def _cells(name: str, card: Card) -> list[str]:
    adapter = card.adapter or {}
    rank = f", rank {adapter['rank']}" if adapter.get("rank") is not None else ""
    return [
        name,
        ", ".join(card.tasks) or "none given",
        f"{adapter.get('method', card.kind)}{rank}",
        card.backbone.name,
        _score(card),
        f"{card.size / 1e6:.1f} MB" if card.size >= 100_000 else f"{card.size / 1e3:.1f} KB",
        card.revision[:8],
    ]


def _score(card: Card) -> str:
    if not card.scores:
        return ""
    first = card.scores[0]
    same = [row for row in card.scores if (row["metric"], row["split"]) == (first["metric"], first["split"])]
    best = (max if first["higher_is_better"] else min)(same, key=lambda row: row["value"])
    return f"{best['metric']} {best['value']:.4g}"
