"""outputs/<command>/<run>/: every file name that a run leaves, and how files get there whole or not at all."""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mole.secrets import scrub

_FILES = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "log.txt",
    "error.txt",
    "samples.jsonl",
    "evaluation.json",
    "table.md",
    "table.csv",
    "generations.jsonl",
    "predictions.jsonl",
    "probes.jsonl",
    "merge.json",
)
_FOLDERS = ("checkpoints", "expert", "mixture", "preparing", "scalings", "plots")
STATUSES = ("preparing", "running", "finished", "stopped", "failed")


class RunStopped(Exception):
    """Training was asked to stop by a signal and has.

    `signal_number` is the signal (2: Ctrl-C, 15: SIGTERM), `checkpoint` the checkpoint to continue from, None if there
    is none.
    """

    def __init__(self, signal_number: int, checkpoint: Path | None = None):
        super().__init__(f"stopped by signal {int(signal_number)}")
        self.signal_number = int(signal_number)
        self.checkpoint = checkpoint

    def __reduce__(self):
        return type(self), (self.signal_number, self.checkpoint)


class RunFolder:
    """The folder of one run. Every property is the path of one thing in it, whether that exists or not."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._made: list[Path] = []  # folders that `create` made, the deepest first

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    config = property(lambda self: self.path / "config.yaml", doc="The resolved configuration: enough to run again.")
    record = property(lambda self: self.path / "run.json", doc="Facts of the run: status, versions, seed, times.")
    metrics = property(lambda self: self.path / "metrics.jsonl", doc="One JSON object for each logged step.")
    log = property(lambda self: self.path / "log.txt", doc="The log.")
    error = property(lambda self: self.path / "error.txt", doc="Traceback of a run that failed.")
    samples = property(lambda self: self.path / "samples.jsonl", doc="The first batch, decoded; generated samples.")
    checkpoints = property(lambda self: self.path / "checkpoints", doc="step-<N>/ folders of resumable state.")
    expert = property(lambda self: self.path / "expert", doc="A plain PEFT folder with its card.")
    mixture = property(lambda self: self.path / "mixture", doc="A saved mixture.")
    preparing = property(lambda self: self.path / "preparing", doc="What a router was trained on before it was used.")
    scalings = property(lambda self: self.path / "scalings", doc="The routing log.")
    plots = property(lambda self: self.path / "plots", doc="Pictures.")
    evaluation = property(lambda self: self.path / "evaluation.json", doc="The table of scores, as data.")
    cells = property(
        lambda self: self.path / "cells.json", doc="Scores of an evaluation that goes on; kept by `clear`."
    )
    table_md = property(lambda self: self.path / "table.md", doc="The table of scores, in Markdown.")
    table_csv = property(lambda self: self.path / "table.csv", doc="The table of scores, for spreadsheets.")
    probes = property(lambda self: self.path / "probes.jsonl", doc="One JSON object for each probe of a search.")
    generations = property(lambda self: self.path / "generations.jsonl", doc="Prompts and what was generated.")
    predictions = property(lambda self: self.path / "predictions.jsonl", doc="What was said of each validation text.")
    merge = property(lambda self: self.path / "merge.json", doc="What each module lost when experts became one.")

    def create(self) -> None:
        """Makes the folder, parents included.

        Raises ValueError if it exists and is not empty, or cannot be made or written to.
        """
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"run.folder={self.path} is not empty; continue that run with --resume {self.path}, "
                "or choose another run.folder"
            )
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self._made = missing
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            self.remove()
            reason = error.strerror or str(error)
            raise ValueError(
                f"run.folder={self.path} cannot be written ({reason}); choose another place with run.folder=…"
            ) from None

    def remove(self) -> None:
        """Takes away the folder's content, the folder and the parents that `create` made, as far as they are empty."""
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self._made = []

    def clear(self) -> None:
        """Takes away what an earlier start of this run left, and nothing that mole does not know."""
        for name in (*_FILES, *_FOLDERS):
            entry = self.path / name
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
        self.remove_leftovers()

    def facts(self) -> dict[str, Any]:
        """What run.json says; empty if there is none yet. Raises ValueError if it is damaged."""
        try:
            return json.loads(self.record.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"{self.record} is damaged ({error}); remove it or choose another run") from None

    def update(self, **facts: Any) -> None:
        """Merges `facts` into run.json, atomically and without secrets. Only rank 0 of several processes writes."""
        if os.environ.get("RANK", "0") != "0":
            return
        status = facts.get("status")
        if status is not None and status not in STATUSES:
            raise AssertionError(f"status {status!r} is none of {STATUSES}")
        merged = scrub({**self.facts(), **facts})
        write_atomically(self.record, json.dumps(merged, indent=2, ensure_ascii=False, default=str) + "\n")

    @property
    def started(self) -> bool:
        """Whether the run's first step has begun: an error before that is the user's, after that the run's."""
        return self.facts().get("status", "preparing") != "preparing"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after optimizer step `step` lies."""
        return self.checkpoints / f"step-{step}"

    def complete_checkpoints(self) -> list[Path]:
        """The checkpoints that were written to the end, the oldest first."""
        found = []
        for folder in self.checkpoints.glob("step-*") if self.checkpoints.is_dir() else ():
            number = folder.name.removeprefix("step-")
            if number.isdigit() and (folder / "complete").is_file():
                found.append((int(number), folder))
        return [folder for _, folder in sorted(found)]

    def remove_leftovers(self) -> None:
        """Takes away what a killed process left half-written. Only for the one who owns the run."""
        for leftover in self.path.rglob(".*.partial-*") if self.path.is_dir() else ():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: str | bytes) -> None:
    """Writes `data` (text as UTF-8) to `path`, which at any moment holds the old content or the new one, never a part.

    The parent folder is made if absent. Raises OSError; then nothing new is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with open(beside, "xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def write_folder_atomically(path: str | Path, fill: Callable[[Path], None], *, replace: bool = False) -> None:
    """Makes the folder `path` by letting `fill` write into a hidden sibling, which then takes the name.

    Raises FileExistsError if `path` exists, unless `replace` is set, and whatever `fill` raises; then nothing is left.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.mkdir()
    try:
        fill(beside)
        for entry in beside.rglob("*"):
            _fsync(entry)
        _fsync(beside)
        _rename_folder(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _fsync(path.parent)


def _rename_folder(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    old = _beside(target)
    target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:12]}")


def _fsync(path: Path) -> None:
    """Asks the disk to keep what it has of a file or a folder (for a folder: the names in it)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
