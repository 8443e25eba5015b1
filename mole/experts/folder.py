"""An expert's folder on disk, or an artefact's: its card, the files that the card lists, and nothing else.

What is copied is hashed while it is copied; what is used is read once, and those bytes are hashed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mole.experts.backends.entries import EXPERTS, AnyCard, Entries
from mole.experts.card import MAX_CARD_BYTES, bytes_facts, file_facts
from mole.experts.errors import Damaged, Refused
from mole.experts.readme import readme
from mole.experts.schema import README_FILE
from mole.untrusted import MAX_WEIGHTS_BYTES, read_file, refuse_pickles, shown

_MOST_ENTRIES = 66
_CHUNK = 1 << 20


def has_card(folder: str | Path, entries: Entries = EXPERTS) -> bool:
    """Whether `folder` is an expert's (or whatever `entries` are)."""
    return (Path(folder) / entries.card_file).is_file()


def read_card(folder: str | Path, entries: Entries = EXPERTS) -> Any:
    """The card in an expert's folder. Raises FileNotFoundError or Damaged."""
    return entries.parse(read_file(Path(folder) / entries.card_file, MAX_CARD_BYTES), str(folder))


def write_card(card: AnyCard, folder: str | Path, entries: Entries = EXPERTS) -> None:
    """Write README.md, then the card: the card comes last, an expert exists when its card does."""
    pages = {README_FILE: readme(card).encode()} if entries.readme else {}  # type: ignore[arg-type]
    for name, data in {**pages, entries.card_file: card.to_bytes()}.items():
        with (Path(folder) / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def check_entries(folder: str | Path, card: AnyCard, entries: Entries = EXPERTS) -> None:
    """Raise Refused or Damaged if the folder has other files than its card lists, lacks one, or one is no file."""
    folder = Path(folder)
    names = []
    with os.scandir(folder) as found:
        for entry in found:
            names.append(entry.name)
            if len(names) > _MOST_ENTRIES:
                raise Refused(
                    f"{folder}: more than {_MOST_ENTRIES} entries; an {entries.what}'s folder holds only its files"
                )
            if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
                raise Refused(f"{folder}: {shown(entry.name)} is not a regular file")
    refuse_pickles(names, str(folder))
    for name in sorted(set(names) - set(card.files) - {entries.card_file, README_FILE}):
        raise Refused(
            f"{folder}: {shown(name)} is not listed in the card; an {entries.what}'s folder holds only its files"
        )
    for name in sorted(set(card.files) - set(names)):
        raise Damaged(f"{folder}: {name} is listed in the card and missing")


def verified_files(folder: str | Path, card: AnyCard) -> dict[str, bytes]:
    """The bytes of the card's files, each read once and equal to what the card says. Raises Damaged or Refused."""
    found = {}
    for name, wanted in card.files.items():
        path = Path(folder) / name
        try:
            data = read_file(path, min(wanted["size"], MAX_WEIGHTS_BYTES), follow=False)
        except FileNotFoundError:
            raise Damaged(f"{path} is listed in the card and missing") from None
        except Refused as error:
            if path.is_file() and path.stat().st_size > wanted["size"]:
                raise _not_the_cards(path, path.stat().st_size, wanted["size"]) from error
            raise
        if bytes_facts(data) != wanted:
            raise _not_the_cards(path, len(data), wanted["size"])
        found[name] = data
    return found


def copy_files(folder: str | Path, target: Path, card: AnyCard, entries: Entries = EXPERTS) -> None:
    """Copy the card's files, then README and card, into the empty folder `target`; everything is on the disk after it.

    Raises Damaged if a file is not what the card says, Refused if one is no regular file of its own.
    """
    for name, wanted in card.files.items():
        _copy(Path(folder) / name, target / name, wanted)
    write_card(card, target, entries)
    sync(target)


def _copy(source: Path, target: Path, wanted: dict) -> None:
    with target.open("wb") as writer:
        for chunk in verified_chunks(source, wanted):
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())


def verified_chunks(path: Path, wanted: dict) -> Iterator[bytes]:
    """The bytes of a file in pieces, the last of which comes only if all of them are what the card says.

    Raises Damaged if they are not, Refused if it is no regular file of its own.
    """
    if path.is_symlink() or not path.is_file():
        raise Damaged(f"{path} is not a regular file, or missing")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    digest, size, last = hashlib.sha256(), 0, b""
    with open(os.open(path, flags), "rb") as reader:
        facts = os.fstat(reader.fileno())
        if facts.st_nlink != 1:
            raise Refused(f"{path} has {facts.st_nlink} hard links; only files of their own are taken")
        if facts.st_size != wanted["size"]:
            raise _not_the_cards(path, facts.st_size, wanted["size"])
        while (chunk := reader.read(_CHUNK)) and size <= wanted["size"]:
            if last:
                yield last
            digest.update(chunk)
            size += len(chunk)
            last = chunk
    if {"size": size, "sha256": digest.hexdigest()} != wanted:
        raise _not_the_cards(path, size, wanted["size"])
    yield last


def check_content(folder: str | Path, card: AnyCard) -> None:
    """Raise Damaged if the bytes of a file are not what the card says."""
    for name, wanted in card.files.items():
        if file_facts(Path(folder) / name) != wanted:
            raise _not_the_cards(Path(folder) / name, (Path(folder) / name).stat().st_size, wanted["size"])


def check_sizes(folder: str | Path, card: AnyCard) -> None:
    """Raise Damaged if a file is missing or has another size than the card says."""
    for name, wanted in card.files.items():
        path = Path(folder) / name
        size = path.stat().st_size if path.is_file() else -1
        if size != wanted["size"]:
            raise _not_the_cards(path, size, wanted["size"])


def sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_the_cards(path: Path, size: int, wanted: int) -> Damaged:
    if size < 0:
        return Damaged(f"{path} is listed in the card and missing")
    told = f"{size:,} bytes instead of {wanted:,}" if size != wanted else "other content of the same size"
    return Damaged(f"{path} is not what the card says: {told}; it is damaged or was changed")
