"""`mole library remove`: take experts out of a library."""

import sys

from pydantic import Field

from mole.commands.library.done import Format, done, print_done
from mole.commands.library.opening import open_library
from mole.experts import ExpertLibrary, LibraryError, UnknownExpert
from mole.registry import config_dataclass, unknown


@config_dataclass
class LibraryRemove:
    """Which experts; `expect` is the revision that one expert has to be at."""

    library: str
    names: tuple[str, ...] = Field(min_length=1)
    expect: str | None = None
    yes: bool = False
    dry_run: bool = False
    format: Format = "table"

    def __post_init__(self) -> None:
        if self.expect is not None and len(self.names) > 1:
            raise ValueError("expect: is one expert's revision; remove one expert at a time with it")


def run(config: LibraryRemove) -> None:
    """Removes the experts together, all of which must be there before the first goes; prints one line each."""
    library = open_library(config.library)
    names = list(dict.fromkeys(config.names))
    known = library.names()
    for name in names:
        if name not in known:
            raise UnknownExpert(f"{library.url}: {unknown('expert', name, known)}")
    if config.dry_run:
        cards = {name: library.look()[0].get(name) for name in names}
    else:
        if not config.yes and not _agreed(library, names):
            raise LibraryError("nothing was removed; add yes=true to remove without being asked")
        with library.batch() as batch:
            cards = {name: batch.remove_expert(name, expect=config.expect) for name in names}
    rows, lines = [], []
    for name, card in cards.items():
        revision = None if card is None else card.revision  # of a damaged card nobody knows it
        rows.append({"name": name, "action": "remove", "revision": revision, "library": library.url})
        what = done("remove", dry_run=config.dry_run)
        at = "damaged" if revision is None else f"revision {revision[:8]}"
        lines.append(f"{what} {name} from {library.url}, {at}; its files stay {library.after_removal}")
    print_done(rows, lines, config.format)


def _agreed(library: ExpertLibrary, names: list[str]) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"remove {', '.join(names)} from {library.url}? [y/N] ").strip().lower() in ("y", "yes")
