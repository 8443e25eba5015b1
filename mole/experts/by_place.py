"""Libraries under the names that people know: nothing but constructors that pick the backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mole.experts.backends import LocalBackend
from mole.experts.library import ExpertLibrary


class LocalExpertLibrary(ExpertLibrary):
    """A library in a folder; with `create`, adding the first expert makes the folder.

    `options` are those of ExpertLibrary.
    """

    def __init__(self, path: str | Path, *, create: bool = True, **options: Any):
        super().__init__(LocalBackend(path), **options)
        if not create:
            self.names()
