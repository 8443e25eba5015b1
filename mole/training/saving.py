"""Who writes a checkpoint: gathered from all processes, written by the main one, survived if it fails."""

import logging
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from mole.run_folder import RunFolder
from mole.training import checkpoints
from mole.training.checkpoints import Checkpoint, CheckpointError
from mole.training.learner import Learner
from mole.training.metrics import MetricsFile
from mole.training.random_streams import capture_streams, restore_streams
from mole.training.selection import Selection

log = logging.getLogger(__name__)


class Saver:
    """Writes and restores the checkpoints of one run.

    `last_good` is the newest that was written whole; `failure` is set while a newer one could not be.
    """

    def __init__(self, run: RunFolder, learner: Learner, keep: int):
        self.run, self.learner, self.keep = run, learner, keep
        self.last_good: Path | None = None
        self.failure: str | None = None
        self._best: dict[str, Tensor] = {}  # a copy: the disk may be full when it would have to be there

    def hold_best(self) -> None:
        """The weights as they are now are the best so far."""
        self._best = {name: tensor.clone().cpu() for name, tensor in self.learner.weights().items()}

    def load_best(self) -> None:
        """Puts the best weights into the model."""
        self.learner.load_weights(self._best)

    def save(self, step: int, facts: dict[str, Any], selection: Selection, metrics: MetricsFile) -> Path | None:
        """Writes the state after `step`; every process calls it, the main one writes.

        Returns the folder, or None if it could not be written: that is logged, and the run can go on.
        """
        accelerator = self.learner.accelerator
        streams = gather_object([capture_streams()])
        failure = None
        if accelerator.is_main_process:
            try:
                self._write(step, {**facts, "streams": streams}, selection, metrics)
            except OSError as error:
                failure = str(error)
        if accelerator.num_processes > 1:
            failure = broadcast_object_list([failure])[0]
        if failure is None:
            self.last_good, self.failure = self.run.checkpoint(step), None
            return self.last_good
        self.failure = failure
        if accelerator.is_main_process:
            log.warning("%s; the last good checkpoint is %s; going on", failure, self.last_good or "none")
        return None

    def _write(self, step: int, facts: dict[str, Any], selection: Selection, metrics: MetricsFile) -> None:
        tensors, optimizer = self.learner.optimizer_state()
        scaler = self.learner.accelerator.scaler
        best_on_disk = selection.best_step in (None, step) or (
            self.run.checkpoint(selection.best_step) in self.run.complete_checkpoints()
        )
        checkpoint = Checkpoint(
            step=step,
            weights=self.learner.weights(),
            optimizer=tensors,
            best={} if best_on_disk else self._best,
            facts={
                **facts,
                "selection": selection.as_dict(),
                "optimizer": optimizer,
                "schedule": self.learner.schedule_state(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "num_processes": self.learner.accelerator.num_processes,
                "metrics_offset": metrics.sync(),
            },
        )
        checkpoints.write(checkpoint, self.run)
        checkpoints.rotate(self.run, self.keep, selection.best_step if best_on_disk else None)

    def require_unused(self) -> None:
        """Raises ValueError if the run has checkpoints: a new run must not mix with an old one."""
        if existing := self.run.complete_checkpoints():
            raise ValueError(
                f"{self.run.path} has checkpoints up to {existing[-1].name}: continue that run with "
                f"--resume {self.run.path}, or choose another run.folder"
            )

    def restore(self) -> tuple[dict[str, Any], Selection] | None:
        """Puts the newest whole checkpoint into the learner; returns its facts and selection, None without one."""
        accelerator = self.learner.accelerator
        found = checkpoints.newest(self.run)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.run.remove_leftovers()
            checkpoints.forget_torn(self.run, found.step if found else 0)
        if found is None:
            return None
        facts = found.facts
        self.learner.load_weights(found.weights)
        self.learner.load_optimizer_state(found.optimizer, facts["optimizer"])
        self.learner.load_schedule_state(facts["schedule"])
        if accelerator.scaler is not None and facts["scaler"]:
            accelerator.scaler.load_state_dict(facts["scaler"])
        self._restore_streams(facts["streams"])
        selection = Selection(**facts["selection"])
        if selection.best_step is not None:
            self._best = checkpoints.best_weights(self.run, found, selection.best_step)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:  # the process that wrote it may have been killed before it did
            checkpoints.rotate(self.run, self.keep, selection.best_step)
        self.last_good = self.run.checkpoint(found.step)
        return {**facts, "step": found.step}, selection

    def _restore_streams(self, states: list[dict[str, Any]]) -> None:
        accelerator = self.learner.accelerator
        if len(states) != accelerator.num_processes and accelerator.is_main_process:
            log.warning(
                "the checkpoint was written by %d processes and goes on with %d: the data order stays, dropout differs",
                len(states),
                accelerator.num_processes,
            )
        if accelerator.process_index < len(states):
            restore_streams(states[accelerator.process_index])

    def require_saved(self) -> None:
        """Raises CheckpointError, naming the last good checkpoint, if the newest state could not be written."""
        if self.failure is not None:
            raise CheckpointError(
                f"{self.failure}; the last good checkpoint is {self.last_good or 'none'}: "
                f"free some space and continue with --resume {self.run.path}"
            )
