"""Train an expert from Python: `mole train-expert` under a name that people know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mole.commands import train_expert
from mole.config import engine, saved
from mole.config.checks import validate
from mole.experts import Expert, load_expert
from mole.run_folder import RunFolder


class ExpertTrainer:
    """One training, described by the overrides that `mole train-expert` takes, in `folder`, which must be new.

        expert = ExpertTrainer("outputs/sums", "backbone=tiny", "adapter=lora", "dataset=arithmetic").train()

    Raises ValueError, one line for each problem, before anything is loaded.
    """

    def __init__(self, folder: str | Path, *overrides: str):
        self.run = RunFolder(folder)
        if self.run.path.exists():
            raise FileExistsError(f"{folder} is there already: choose a new folder for the run")
        self.node = engine.compose("train-expert", [*overrides, f"run.folder={folder}"])
        self.config: Any = validate("train-expert", self.node)
        self.score: float | None = None

    def train(self) -> Expert:
        """Trains, evaluates, and publishes where a `library` is set; gives the expert, and sets `score`."""
        self.run.create()
        saved.write(self.run.config, self.node)
        self.score = train_expert.run(self.config)
        return load_expert(self.run.path)
