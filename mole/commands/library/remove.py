"""`mole library remove`: take experts out of a library."""

import sys

from pydantic import Field

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

    def __post_init__(self) -> None:
        if self.expect is not None and len(self.names) > 1:
            raise ValueError("expect: is one expert's revision; remove one expert at a time with it")


def run(config: LibraryRemove) -> None:
    """Removes the experts, all of which must be there before the first goes; prints one line each."""
    library = ExpertLibrary.open(config.library)
    known = library.names()
    for name in config.names:
        if name not in known:
            raise UnknownExpert(f"{library.url}: {unknown('expert', name, known)}")
    if config.dry_run:
        for name in config.names:
            print(f"would remove {name} from {library.url}, revision {library.card(name).revision[:8]}")
        return
    if not config.yes and not _agreed(library, config.names):
        raise LibraryError("nothing was removed; add yes=true to remove without being asked")
    for name in config.names:
        card = library.remove_expert(name, expect=config.expect)
        print(f"removed {name} from {library.url}, revision {card.revision[:8]}; its files stay in .mole/history there")


def _agreed(library: ExpertLibrary, names: tuple[str, ...]) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"remove {', '.join(names)} from {library.url}? [y/N] ").strip().lower() in ("y", "yes")
