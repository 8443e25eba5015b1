"""`-m`: many runs of one command. Every job is checked before the first starts; sweep.jsonl has one line for each."""

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mole.cli import runs
from mole.command import Command
from mole.config import engine as engines
from mole.config.checks import ConfigProblems
from mole.run_folder import RunFolder
from mole.secrets import scrub

RECORD = "sweep.jsonl"
_COLUMNS = ("job", "status", "objective", "overrides", "folder")


class StopSweep(BaseException):
    """A job was stopped by a signal: no further one starts. `code` is the exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Job:
    """What Hydra calls for each job, perhaps in another process."""

    command: Command
    root: str
    parent: str | None = None

    def __call__(self, config: DictConfig) -> float | None:
        hydra = HydraConfig.get()
        number, given = int(hydra.job.num), list(hydra.overrides.task)
        node = engines.plain(config)
        node["run"] = {**node["run"], "folder": str(Path(self.root) / str(number))}
        outcome = runs.start(runs.Plan(self.command, node, parent=self.parent))
        value = outcome.value if isinstance(outcome.value, int | float) else None
        line = {
            "job": number,
            "overrides": given,
            "folder": str(Path(self.root) / str(number)),
            "status": outcome.status,
            "code": outcome.code,
            "objective": value,
            "error": "\n".join(outcome.lines) if outcome.code else None,
        }
        _append(Path(self.root) / RECORD, json.dumps(scrub(line), ensure_ascii=False, default=str))
        if outcome.code in (runs.INTERRUPTED, runs.TERMINATED, runs.REQUEUE):
            raise StopSweep(outcome.code)
        return value


def expand(engine: engines.Engine, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job, as the basic sweeper makes them; of one job under any other sweeper.

    Sweeps that YAML keeps under `hydra.sweeper.params` count, less those that the line gives anew.
    """
    loaded = engine.hydra.config_loader.load_configuration(engine.config_name, list(overrides), RunMode.MULTIRUN)
    sweeper = OmegaConf.to_container(loaded.hydra.sweeper, resolve=False)
    params = (sweeper.get("params") or {}) if isinstance(sweeper, dict) else {}
    is_basic = isinstance(sweeper, dict) and str(sweeper.get("_target_", "")).endswith("BasicSweeper")
    given = {o.lstrip("+~").partition("=")[0] for o in overrides}
    words = [f"{k}={v}" for k, v in params.items() if k not in given] if is_basic else []
    parser = OverridesParser.create()
    choices: list[list[str]] = []
    for override in parser.parse_overrides([*words, *overrides]):
        if override.is_sweep_override() and (override.is_discrete_sweep() or not is_basic):
            key = override.get_key_element()
            found = [f"{key}={v}" for v in override.sweep_string_iterator()] if override.is_discrete_sweep() else []
            choices.append(found if is_basic else found[:1])
        elif not override.is_hydra_override() or is_basic:
            choices.append([str(override.input_line)])
    return [list(job) for job in itertools.product(*(c for c in choices if c))]


def check(command: Command, engine: engines.Engine, jobs: Iterable[Sequence[str]], plan: runs.Plan) -> None:
    """Composes and validates every job. Raises ConfigProblems with what is wrong, each line once."""
    lines: list[str] = []
    for given in jobs:
        node = engines.plain(engine.compose([o for o in given if not o.lstrip("+~").startswith("hydra")]))
        try:
            runs.check(replace(plan, node=node))
        except ConfigProblems as error:
            lines += [line for line in error.lines if line not in lines]
    if lines:
        raise ConfigProblems(lines)


def run(
    command: Command, engine: engines.Engine, overrides: Sequence[str], root: Path, parent: str | None
) -> tuple[int, str]:
    """Runs every job under `root`; returns the exit code and the table of all jobs.

    Raises ValueError if `root` is not empty or cannot be written.
    """
    root = root.absolute()
    RunFolder(root).create()
    place = [f"hydra.sweep.dir='{root}'", "hydra.sweep.subdir=${hydra.job.num}", "hydra.mode=MULTIRUN"]
    code = 0
    try:
        engine.hydra.multirun(engine.config_name, Job(command, str(root), parent), [*overrides, *engines.QUIET, *place])
    except StopSweep as stopped:
        code = stopped.code
    finally:
        (root / "multirun.yaml").unlink(missing_ok=True)  # Hydra's own record keeps what was typed, secrets included
    lines = read(root)
    return code or (1 if any(line["code"] for line in lines) else 0), table(lines)


def read(root: Path) -> list[dict[str, Any]]:
    """The lines of a sweep's record, in the order of the jobs."""
    file = root / RECORD
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda line: line["job"])


def table(lines: Sequence[dict[str, Any]]) -> str:
    """One row for each job, with the overrides that not all jobs share; under it what went wrong."""
    shared = set.intersection(*(set(line["overrides"]) for line in lines)) if len(lines) > 1 else set()
    lines = [{**line, "overrides": [o for o in line["overrides"] if o not in shared]} for line in lines]
    rows = [_COLUMNS, *(tuple(_cell(line[column]) for column in _COLUMNS) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*shown, *(f"job {line['job']}: {line['error']}" for line in lines if line["error"])])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _append(file: Path, line: str) -> None:
    """One write of one line: jobs of several processes do not mix theirs."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (line + "\n").encode("utf-8"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
