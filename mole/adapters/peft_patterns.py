"""Plain names in PEFT's `rank_pattern` and `alpha_pattern`, looked up without running them as regular expressions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_PLAIN = re.compile(r"[A-Za-z0-9_.]{1,300}", re.ASCII)


def is_plain(name: str) -> bool:
    """Whether a pattern is a name or the end of a path."""
    return bool(_PLAIN.fullmatch(name))


class PatternTable:
    """Values by module: a pattern is a whole path, or the end of paths in whole components; the first that fits wins.

    An anchor in front or behind and escaped dots are taken as the plain name that they stand for. Other regular
    expressions are listed in `unreadable`.
    """

    def __init__(self, patterns: Mapping[str, Any]):
        self.unreadable: list[str] = []
        self._values: dict[tuple[str, bool], tuple[int, Any]] = {}
        for place, (pattern, value) in enumerate(patterns.items()):
            whole = pattern.startswith("^")
            name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if is_plain(name):
                self._values.setdefault((name, whole), (place, value))
            else:
                self.unreadable.append(pattern)

    def find(self, path: str) -> Any:
        """The value for the module at `path`, or None."""
        parts = path.split(".")
        keys = [(path, True), *((".".join(parts[start:]), False) for start in range(len(parts)))]
        found = [self._values[key] for key in keys if key in self._values]
        return min(found, key=lambda row: row[0])[1] if found else None
