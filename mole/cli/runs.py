"""The life of one run: its folder, config.yaml and run.json, the workers, and what is said and kept at the end.

A ValueError or OSError before the first step is the user's: exit code 2, and nothing stays on disk. After that the run
has failed: exit code 1, and error.txt has the traceback.
"""

import datetime
import json
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mole import host
from mole.cli import launch
from mole.command import Command
from mole.config import paths
from mole.config import saved as saved_config
from mole.config.checks import ConfigProblems, validate
from mole.run_folder import RunFolder, RunStopped, write_atomically
from mole.secrets import scrub

logger = logging.getLogger("mole")

DONE, FAILED, USAGE, REQUEUE, INTERRUPTED, TERMINATED = 0, 1, 2, 75, 130, 143


class Terminated(BaseException):
    """SIGTERM outside the training loop, which would have finished its step."""


@dataclass(frozen=True)
class Plan:
    """What is to be run: a command and its composed configuration as plain data.

    `auto_named`: the folder's name came from the clock, so that another may be taken if it exists. `parent`: the run
    whose configuration this one started from. The rest is for messages, as `config.validate` takes it.
    """

    command: Command
    node: dict[str, Any]
    auto_named: bool = False
    options: Mapping[str, list[str]] = field(default_factory=dict)
    required: Sequence[str] = ()
    where: Callable[[str], str] = lambda key: ""
    comment: Callable[[str], str] = lambda key: ""
    parent: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How it ended: exit code, status, what `run` returned (the objective, for runs), folder, what to tell the user."""

    code: int
    status: str
    value: Any = None
    folder: Path | None = None
    lines: tuple[str, ...] = ()


def check(plan: Plan) -> Any:
    """The plan's configuration, validated. Raises ConfigProblems."""
    schema, _ = plan.command.load()
    return validate(schema, plan.node, plan.options, plan.required, plan.where, plan.comment)


def start(plan: Plan) -> Outcome:
    """Runs a command from its checked configuration to its end. Raises nothing but what MOLE_FULL_ERROR asks for."""
    with _sigterm():
        try:
            config = check(plan)
            if saved_config.has_folder(plan.node):
                return _Life(plan).live()
            _, function = plan.command.load()
            value = function(config)
            code = value if isinstance(value, int) and not isinstance(value, bool) else DONE
            return Outcome(code, "finished", value)
        except KeyboardInterrupt:
            return Outcome(INTERRUPTED, "stopped", lines=("interrupted",))
        except Terminated:
            return Outcome(TERMINATED, "stopped", lines=("terminated",))
        except ConfigProblems as error:
            title = f"{plan.command.name}: {len(error.lines)} problem(s) in the configuration"
            return Outcome(USAGE, "refused", lines=(title, *error.lines))
        except BrokenPipeError:
            raise
        except Exception as error:
            if os.environ.get("MOLE_FULL_ERROR"):
                raise
            logger.debug("", exc_info=True)
            code = USAGE if launch.is_input_error(error) else FAILED
            lines = launch.describe(error) if code == USAGE else f"{type(error).__name__}: {launch.describe(error)}"
            return Outcome(code, "refused" if code == USAGE else "failed", lines=tuple(lines.splitlines()))


class _Life:
    """One run from its folder to its last word."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.node = paths.absolute(plan.node)
        self.run = RunFolder(self.node["run"]["folder"])
        self.is_new = True  # the folder is ours to take away again
        self.before: dict[str, Any] = {}  # run.json of an earlier start
        self.began = time.monotonic()

    def live(self) -> Outcome:
        if launch.is_outer():
            return self._join()
        done = self._prepare()
        if done is not None:
            return done
        count = launch.count_processes(self.node)
        self._announce(count)
        work = launch.Work(self.plan.command, str(self.run.path), _screen_level())
        return self._watch(lambda: launch.run_several(work, count) if count > 1 else launch.run_worker(work))

    def _join(self) -> Outcome:
        """One of several processes that somebody else started: rank 0's configuration and folder hold for all."""
        rank = int(os.environ["RANK"])
        done: Outcome | None = None
        problem: Exception | None = None
        if rank == 0:
            try:
                done = self._prepare()
            except ValueError as error:
                problem = error
        try:
            shared = launch.share(self.node if rank == 0 and not (done or problem) else None)
        except ValueError:
            if rank == 0 and not (done or problem):
                self._forget()
                raise
            if done is not None:
                return done
            if problem is not None:
                raise problem from None
            return Outcome(USAGE, "refused")  # rank 0 says why
        self.node, self.run = shared, RunFolder(shared["run"]["folder"])
        if rank == 0:
            self._announce(int(os.environ["WORLD_SIZE"]))
        work = launch.Work(self.plan.command, str(self.run.path), _screen_level())
        outcome = self._watch(lambda: launch.run_worker(work), is_owner=rank == 0)
        launch.leave_group()
        return outcome

    def _prepare(self) -> Outcome | None:
        """Makes or reopens the folder, writes config.yaml and run.json; an outcome if there is nothing left to do."""
        run, goes_on = self.run, self.node["run"].get("resume") == "auto"
        if goes_on and run.config.is_file():
            self.before = run.facts()
            self._compare()
            if self.before.get("status") == "finished":
                line = f"{run.path} is finished already; run it again with --from {run.path}"
                return Outcome(DONE, "finished", self.before.get("objective"), run.path, (line,))
            self._check_resuming(goes_on)
            self.is_new = False
            if run.complete_checkpoints():
                run.remove_leftovers()
            else:
                run.clear()
        else:
            self._check_resuming(goes_on)
            if self.plan.auto_named:
                self.run = run = free(run)
                self.node["run"]["folder"] = str(run.path)
            run.create()
        try:
            saved_config.write(run.config, self.node)
            run.update(**self._facts())
        except OSError:
            self._forget()
            raise
        return None

    def _check_resuming(self, goes_on: bool) -> None:
        if goes_on and not self.plan.command.resumes:
            raise ValueError(
                f"run.resume=auto cannot act: mole {self.plan.command.name} starts anew each time; leave it at never"
                + (f", and run it again with --from {self.run.path}" if self.before else "")
            )

    def _compare(self) -> None:
        changed = saved_config.differences(saved_config.read(self.run.config), self.node)
        if changed:
            raise ValueError(
                f"{self.run.path} was started with another value of {', '.join(changed)}; a run goes on as it began: "
                f"to change that, start another with --from {self.run.path}"
            )

    def _facts(self) -> dict[str, Any]:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        if self.before:
            return {"status": "preparing", "continued": [*self.before.get("continued", []), now]}
        facts = {
            "status": "preparing",
            "command": self.plan.command.name,
            "choices": saved_config.choices(self.node),
            "seed": self.node.get("seed"),
            "started": now,
            "versions": host.versions(),
            "commit": host.git_commit(),
            "host": host.facts(),
        }
        return facts | ({"from": self.plan.parent} if self.plan.parent else {})

    def _announce(self, count: int) -> None:
        self.run.update(processes=count)
        chosen = " ".join(f"{group}={option}" for group, option in saved_config.choices(self.node).items())
        logger.info("%s: %s", self.plan.command.name, chosen or "no choices")
        logger.info("%d process%s%s, run folder %s", count, "" if count == 1 else "es", self._place(), self.run.path)

    def _place(self) -> str:
        """Device and number type of the backbone, as far as they are known before it is read."""
        backbone = self.node.get("backbone")
        if not isinstance(backbone, Mapping) or "device" not in backbone:
            return ""
        from mole.backbones import resolve_device

        device = backbone["device"]
        with suppress(ValueError):  # loading says what is wrong with it
            device = resolve_device(device)
        return f", device {device}, dtype {backbone.get('dtype', 'auto')}"

    def _watch(self, work: Callable[[], Any], is_owner: bool = True) -> Outcome:
        """Does the work; writes down how it ended, if this process owns the folder."""
        try:
            value = work()
        except RunStopped as stopped:
            return self._stopped(stopped.signal_number, stopped.checkpoint)
        except KeyboardInterrupt:
            return self._stopped(signal.SIGINT, None)
        except Terminated:
            return self._stopped(signal.SIGTERM, None)
        except Exception as error:
            return self._failed(error, is_owner)
        if self.node.get("dry_run"):
            if is_owner:
                self._forget()
            return Outcome(DONE, "finished", value)
        if is_owner:
            self._end("finished", objective=value if isinstance(value, int | float) else None)
        if is_owner:
            logger.info("finished: %s", self.run.path)
        return Outcome(DONE, "finished", value, self.run.path)

    def _stopped(self, number: int, checkpoint: Path | None) -> Outcome:
        code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        if not self.run.started:
            self._forget()
            return Outcome(code, "stopped", lines=("stopped before the first step",))
        done = self.run.complete_checkpoints()
        checkpoint = checkpoint or (done[-1] if done else None)
        if number != signal.SIGINT and checkpoint is not None:
            code = REQUEUE
        self._end("stopped")
        kept = f"continue after {checkpoint.name}" if checkpoint else "no checkpoint was written; start again"
        flag = "--resume" if self.plan.command.resumes else "--from"
        line = f"{kept} with: mole {self.plan.command.name} {flag} {self.run.path}"
        return Outcome(code, "stopped", None, self.run.path, ("stopped on request", line))

    def _failed(self, error: Exception, is_owner: bool) -> Outcome:
        if os.environ.get("MOLE_FULL_ERROR"):
            raise error
        worker = error if isinstance(error, launch.WorkerFailed) else None
        is_input = worker.is_input if worker else launch.is_input_error(error)
        message = worker.message if worker else launch.describe(error)
        if not is_owner:
            return Outcome(USAGE if is_input else FAILED, "failed")
        if is_input and not self.run.started:
            self._forget()
            return Outcome(USAGE, "refused", lines=tuple(scrub(message).splitlines()))
        trace = worker.trace if worker else "".join(traceback.format_exception(error))
        try:
            write_atomically(self.run.error, scrub(trace))
            self._end("failed", error=message)
        except OSError as second:  # a full disk, say: the first error matters more
            logger.warning("%s cannot be written: %s", self.run.error, launch.describe(second))
        kind = worker.kind if worker else type(error).__name__
        who = f"rank {worker.rank} failed" if worker else "the run failed"
        text = f"{who}: {kind}: {message}" if kind and not is_input else f"{who}: {message}"
        lines = (*scrub(text).splitlines(), f"traceback: {self.run.error}")
        if self.run.complete_checkpoints():
            lines = (*lines, f"continue with: mole {self.plan.command.name} --resume {self.run.path}")
        return Outcome(FAILED, "failed", None, self.run.path, lines)

    def _end(self, status: str, **facts: Any) -> None:
        wall = self.before.get("wall_seconds", 0.0) + time.monotonic() - self.began
        self.run.update(status=status, wall_seconds=round(wall, 3), peak_memory=host.peak_memory(), **facts)

    def _forget(self) -> None:
        """Nothing was started: a folder that we made goes, one that was there before gets its record back."""
        if self.is_new:
            self.run.remove()
        elif self.before:
            write_atomically(self.run.record, json.dumps(self.before, indent=2, ensure_ascii=False) + "\n")


def free(run: RunFolder) -> RunFolder:
    """The folder, or with `-2`, `-3` … behind its name the first that is free: two runs may start in one second."""
    number, path = 1, run.path
    while path.exists():
        number += 1
        path = run.path.with_name(f"{run.path.name}-{number}")
    return RunFolder(path)


def _screen_level() -> int:
    levels = [h.level for h in logger.handlers if h.__class__.__module__ == "mole.log"]
    return min(levels, default=logging.INFO)


@contextmanager
def _sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that folders are tidied; in the main thread, where python takes handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
