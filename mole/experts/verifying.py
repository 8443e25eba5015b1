"""Is everything in a library what its cards say? Every file, every card, and what else lies there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mole.experts.backends import Backend
from mole.experts.damage import way_out
from mole.experts.errors import LibraryError, UnknownExpert
from mole.experts.expert import read_adapter
from mole.registry import unknown
from mole.untrusted import shown


@dataclass(frozen=True)
class Problem:
    """Something wrong in a library: at an expert, or at an entry that is none."""

    name: str
    text: str


def verify(backend: Backend, names: Iterable[str] | None, *, quick: bool) -> Iterator[Problem | str]:
    """The name of each sound expert, a Problem for all else, as it goes; `quick` looks at cards and sizes only."""
    known = list(backend.cards())
    chosen = list(names) if names else known
    for name in chosen:
        if name not in known:
            raise UnknownExpert(f"{backend.url}: {unknown('expert', name, known)}")
    for name in chosen:
        yield _verified(backend, name, quick)
    if not names:
        for entry in backend.strays():
            yield Problem(shown(entry), "no expert: it has no card, or a name that no expert can have")


def _verified(backend: Backend, name: str, quick: bool) -> Problem | str:
    try:
        card = backend.verify(name, quick=quick)
        if not quick and card.kind == "adapter":
            with tempfile.TemporaryDirectory(prefix="mole-verify-") as place:
                backend.fetch(name, Path(place))
                read_adapter(place, card)
    except LibraryError as error:
        return Problem(name, f"{error}; {way_out(backend.url, name)}")
    except OSError as error:
        return Problem(name, f"cannot be read: {error.strerror or error}")
    return name
