"""What a run left for plots: its metrics and its routing log, read when asked for."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from mole.routing.log_files import INDEX, LoggedRun, load_routing_log
from mole.routing.weights_log import WEIGHTS, LoggedWeights, read_weights
from mole.run_folder import RunFolder


class CannotPlot(ValueError):
    """The run did not leave what this plot shows."""


class RunRecord:
    """The logs in a run's folder. Raises ValueError if there is no such folder."""

    def __init__(self, folder: str | Path):
        self.folder = RunFolder(folder)
        if not self.folder.path.is_dir():
            raise ValueError(f"no run folder at {folder}: give the folder that a command left under outputs/")

    @property
    def name(self) -> str:
        """The folder's name, for titles."""
        return self.folder.path.resolve().name

    @cached_property
    def routing(self) -> LoggedRun:
        """The routing log. Raises CannotPlot if there is none, ValueError if it is damaged."""
        if not (self.folder.scalings / INDEX).is_file():
            raise CannotPlot(f"{self.folder.path} has no routing log (scalings/{INDEX})")
        return load_routing_log(self.folder.scalings)

    @cached_property
    def weights(self) -> LoggedWeights:
        """The log of learned weights, so far. Raises CannotPlot if there is none, ValueError if it is damaged."""
        path = self.folder.scalings / WEIGHTS
        if not path.is_file():
            raise CannotPlot(f"{self.folder.path} has no log of learned weights (scalings/{WEIGHTS})")
        return read_weights(path)

    @cached_property
    def scores(self) -> tuple[str, dict[str, dict[str, float]]]:
        """Metric, and model → task → score, of an evaluation. CannotPlot if there is none, ValueError if damaged."""
        path = self.folder.evaluation
        if not path.is_file():
            raise CannotPlot(f"{self.folder.path} is no evaluation ({path.name})")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = {row: {task: number(v) for task, v in values.items()} for row, values in found["rows"].items()}
            return str(found["metric"]), rows
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not an evaluation: {error!r}") from None

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. Raises CannotPlot if there are none, ValueError if one is damaged."""
        path = self.folder.metrics
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                record["step"] = int(record["step"])
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):  # a killed run may leave half of its last line
                    continue
                raise ValueError(f"{path}:{number}: not a line of metrics: {error!r}") from None
            found.append(record)
        if not found:
            raise CannotPlot(f"{self.folder.path} has no training metrics (metrics.jsonl)")
        return found


def number(value: Any) -> float:
    """A metric as a number; null (what JSON has for nan) and anything else as nan."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
