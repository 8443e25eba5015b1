"""What a library in a folder needs no more: staging folders of writers that died, old revisions that nobody asked for.

.mole/new-<uuid>/                     goes when nothing in it has been written for long
.mole/history/<name>/<revision>/      goes when it has been there for long and is none of the `keep` newest
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from mole.experts.backends.backend import Garbage

LEAST_AGE = timedelta(hours=1)  # of a staging folder: its writer may still be at work


def garbage(aside: Path, older_than: timedelta, keep: int) -> Iterator[tuple[Path, Garbage]]:
    """Path and description of each folder that may go. To be called under the lock."""
    now = time.time()
    for stage in sorted(aside.glob("new-*")):
        if now - _written(stage) >= max(older_than, LEAST_AGE).total_seconds():
            yield stage, Garbage(_place(stage, aside), "left by a writer that was cut short", _size(stage))
    for home in sorted((aside / "history").glob("*")):
        yield from _old_revisions(home, aside, now - older_than.total_seconds(), keep)


def _old_revisions(home: Path, aside: Path, before: float, keep: int) -> Iterator[tuple[Path, Garbage]]:
    # A folder's ctime is when it was moved into the history: its mtime would be when the revision was published.
    found = sorted(((path.stat().st_ctime_ns, path) for path in home.iterdir()), reverse=True)
    revisions = [(moved, path) for moved, path in found if not path.name.startswith("damaged-")]
    kept = {path for _, path in revisions[:keep]}
    for moved, path in found:
        if path not in kept and moved / 1e9 <= before:
            what = "an old revision" if (moved, path) in revisions else "damaged when it was replaced"
            yield path, Garbage(_place(path, aside), f"{what}, there since {_day(moved)}", _size(path))


def moved_away(paths: list[Path], aside: Path) -> list[Path]:
    """The folders under names of staging folders, where a death in the middle of deleting them does no harm."""
    dead = []
    for path in paths:
        dead.append(aside / f"new-{uuid.uuid4().hex}")
        os.rename(path, dead[-1])
        if path.parent != aside and not any(path.parent.iterdir()):
            path.parent.rmdir()
    return dead


def _written(folder: Path) -> float:
    """When something in the folder was last written."""
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _place(path: Path, aside: Path) -> str:
    return path.relative_to(aside.parent).as_posix()


def _day(nanoseconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(nanoseconds / 1e9))
