"""`mole library verify`: is everything in a library what its cards say?"""

from typing import Literal

from mole.commands.library.opening import open_library
from mole.commands.library.output import print_json
from mole.experts import Problem
from mole.registry import config_dataclass


@config_dataclass
class LibraryVerify:
    """Which library, and which of its experts: all, if none is named."""

    library: str
    names: tuple[str, ...] = ()
    quick: bool = False
    format: Literal["table", "json", "names"] = "table"


def run(config: LibraryVerify) -> int:
    """Prints what was found; the exit code is 1 if anything is wrong. `names` prints the names of what is wrong."""
    library = open_library(config.library)
    found = list(library.verify(config.names, quick=config.quick))
    wrong = [entry for entry in found if isinstance(entry, Problem)]
    sound = [entry for entry in found if not isinstance(entry, Problem)]
    if config.format == "json":
        print_json({"sound": sound, "wrong": [{"name": p.name, "problem": p.text} for p in wrong]})
    elif config.format == "names":
        print("".join(f"{name}\n" for name in dict.fromkeys(p.name for p in wrong)), end="")
    else:
        for problem in wrong:
            print(f"{problem.name}: {problem.text}")
        looked = "sizes and cards" if config.quick else "every byte"
        print(f"{len(sound)} sound, {len(wrong)} wrong in {library.url} ({looked} checked)")
    return 1 if wrong else 0
