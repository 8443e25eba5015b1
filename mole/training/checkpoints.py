"""Checkpoints: all that a run needs to go on as if it had never stopped, as safetensors and JSON.

    checkpoints/step-<N>/
      weights.safetensors    what is trained, by name
      optimizer.safetensors  the optimizer's tensors, "<parameter>:<slot>"
      best.safetensors       the best weights so far, only where the best step's own folder could not be written
      state.json             counters, schedule, scaler, generators of every rank, selection, length of metrics.jsonl
      complete               the size of each file above; written last

A folder appears whole or not at all. The newest ones and the best are kept.
"""

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mole.run_folder import RunFolder, write_folder_atomically

log = logging.getLogger(__name__)
FORMAT = 1


@dataclass
class Checkpoint:
    """The state after optimizer step `step`. `facts` is what JSON takes."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]
    best: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File name → tensors by name, empty ones left out."""
        files = {"weights": self.weights, "optimizer": self.optimizer, "best": self.best}
        return {f"{name}.safetensors": tensors for name, tensors in files.items() if tensors}


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are untouched."""


def write(checkpoint: Checkpoint, run: RunFolder) -> Path:
    """Writes `checkpoints/step-<N>`. Raises CheckpointError; then nothing of it is left."""
    target = run.checkpoint(checkpoint.step)

    def fill(folder: Path) -> None:
        for name, tensors in checkpoint.tensors().items():
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / name)
        facts = {"format": FORMAT, "step": checkpoint.step, **checkpoint.facts}
        (folder / "state.json").write_text(json.dumps(facts), encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        (folder / "complete").write_text(json.dumps(sizes), encoding="utf-8")

    try:
        write_folder_atomically(target, fill, replace=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written ({error})") from error
    return target


def read(folder: Path) -> Checkpoint:
    """Reads a checkpoint. Raises ValueError saying what is wrong with one that is torn or from another version."""
    if not (folder / "complete").is_file():
        raise ValueError("it was not written to its end")
    try:
        sizes = json.loads((folder / "complete").read_text(encoding="utf-8"))
        for name, size in sizes.items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} has {(folder / name).stat().st_size} bytes instead of {size}")
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']}, this version reads {FORMAT}")
        parts = {part: _load(folder / f"{part}.safetensors") for part in ("weights", "optimizer", "best")}
        return Checkpoint(step=facts["step"], facts=facts, **parts)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from None


def _load(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.exists() else {}


def newest(run: RunFolder) -> Checkpoint | None:
    """The newest checkpoint that can be read, None without one. Torn ones are passed over, with a message."""
    for folder in reversed(_folders(run)):
        try:
            return read(folder)
        except ValueError as error:
            log.warning("checkpoint %s passed over: %s", folder, error)
    return None


def _folders(run: RunFolder) -> list[Path]:
    """All that have a checkpoint's name, whole or torn, the oldest first."""
    folders = run.checkpoints.glob("step-*") if run.checkpoints.is_dir() else ()
    numbered = [(int(number), folder) for folder in folders if (number := folder.name[5:]).isdigit()]
    return [folder for _, folder in sorted(numbered)]


def forget_torn(run: RunFolder, restored_step: int) -> None:
    """Removes what was passed over for the checkpoint of `restored_step`: it must not count as newest later on."""
    for folder in _folders(run):
        if int(folder.name[5:]) > restored_step or not (folder / "complete").is_file():
            _remove(folder)


def rotate(run: RunFolder, keep: int, best_step: int | None) -> None:
    """Removes all complete checkpoints but the newest `keep` and that of the best step."""
    for folder in run.complete_checkpoints()[:-keep]:
        if best_step is None or folder != run.checkpoint(best_step):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Under a hidden name first, so that half a folder never looks like a whole one; a resumed run sweeps those."""
    hidden = folder.with_name(f".{folder.name}.partial-removed")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def best_weights(run: RunFolder, checkpoint: Checkpoint, best_step: int) -> dict[str, Tensor]:
    """The weights of the best step, for a run that goes on from `checkpoint`. Raises ValueError if they are gone."""
    if checkpoint.step == best_step:
        return checkpoint.weights
    if checkpoint.best:
        return checkpoint.best
    try:
        return read(run.checkpoint(best_step)).weights
    except ValueError as error:
        raise ValueError(
            f"the best checkpoint {run.checkpoint(best_step)} cannot be read: {error}; "
            f"put it back, or start the run again"
        ) from None
