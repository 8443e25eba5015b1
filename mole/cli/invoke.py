"""One command from its words and flags to its end, through the engine: help, views, a run, a sweep, a run again."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import mole
from mole import secrets
from mole.cli import help as texts
from mole.cli import hints, runs, sweep
from mole.command import Command
from mole.config import engine as engines
from mole.config import overrides as override_words
from mole.config import saved as saved_config
from mole.config import yaml_files
from mole.config.checks import ConfigProblems
from mole.run_folder import RunFolder

Perform = Callable[[list[str]], int]


def run(command: Command, given: argparse.Namespace, folders: Sequence[str], perform: Perform) -> int:
    """Does what the line asks for and returns the exit code; prints what went wrong, without a traceback.

    `perform` runs another command line, for scripts.
    """
    lines: list[str] = []
    try:
        with engines.engine(command.config_name, folders) as engine:
            call = _Call(command, given, engine, perform)
            try:
                return call.do()
            except ConfigProblems as error:
                title = f"{command.name}: {len(error.lines)} problem(s) in the configuration"
                lines = [title, *error.lines, *call.remarks()]
            except (HydraException, OmegaConfBaseException) as error:
                if os.environ.get("MOLE_FULL_ERROR"):
                    raise
                lines = list(hints.explain(error, engine, call.overrides))
    except (ValueError, OSError, yaml.YAMLError) as error:
        if isinstance(error, BrokenPipeError) or os.environ.get("MOLE_FULL_ERROR"):
            raise
        lines = str(error).splitlines()
    except Exception as error:  # the engine's, or ours: a traceback would not help whoever typed the line
        if os.environ.get("MOLE_FULL_ERROR"):
            raise
        say([f"{type(error).__name__}: {error}", "MOLE_FULL_ERROR=1 shows the traceback"])
        return runs.FAILED
    say(lines)
    return runs.USAGE


def say(lines: Sequence[str]) -> None:
    """A message to stderr: `mole:` before its first line, the others under it."""
    if lines:
        print(secrets.scrub("mole: " + "\n      ".join(lines)), file=sys.stderr)


class _Call:
    """One invocation: the words made into overrides, and what is done with them."""

    def __init__(self, command: Command, given: argparse.Namespace, engine: engines.Engine, perform: Perform):
        self.command, self.given, self.engine, self.perform = command, given, engine, perform
        self.overrides: list[str] = []
        source = given.resume or given.source
        self.source = Path(source) if source else None

    def do(self) -> int:
        given, engine = self.given, self.engine
        words = override_words.fill_operands(given.words, self.command.operands, f"mole {self.command.name}")
        words += self._listing() if given.json else []
        if given.source and given.resume:
            raise ValueError("--from starts another run and --resume goes on with one: give one of them")
        if not given.cfg and (given.resolve or given.package):
            flag = "--resolve" if given.resolve else "--package"
            raise ValueError(f"{flag} says how --cfg prints: give --cfg job {flag}, or leave it out")
        if self.source:
            self._start_from(words)
        self.overrides = override_words.rewrite(words, engine, sweep=given.multirun)
        if given.help:
            print(texts.full_command(self.command, engine, self.overrides, given.all))
            return runs.DONE
        if given.cfg:
            quiet = [] if given.cfg == "job" else list(engines.QUIET)
            package = given.package
            with _root_log_kept():
                engine.hydra.show_cfg(engine.config_name, [*self.overrides, *quiet], given.cfg, package, given.resolve)
            return runs.DONE
        if given.info:
            with _root_log_kept():
                engine.hydra.show_info(given.info, config_name=engine.config_name, overrides=self.overrides)
            return runs.DONE
        return self._sweep() if given.multirun else self._run()

    def remarks(self) -> Iterator[str]:
        """What may stand behind problems: a preset without its first line, a run that another version has written."""
        for group, option in self.engine.groups(self.overrides).items():
            file = self.engine.file(group, option) if option else None
            if group == "experiment" and file is not None and not yaml_files.is_global(file):
                yield f"{file} sets what stands under experiment; its first line should be: # @package _global_"
        if self.source is None:
            return
        version = RunFolder(self.source).facts().get("versions", {}).get("mole")
        if version not in (None, mole.__version__):
            yield f"{self.source} was written by mole {version}; this is mole {mole.__version__}"

    def _run(self) -> int:
        plan = self._plan(self.engine.compose(self.overrides))
        config = runs.check(plan)  # before the engine starts anything
        if self.command.script:
            return self._script(config)
        outcome = self._through_engine() if self._needs_engine(plan) else runs.start(plan)
        say(outcome.lines) if outcome.code else [print(line) for line in outcome.lines]
        return outcome.code

    def _needs_engine(self, plan: runs.Plan) -> bool:
        """Whether the engine has to start the job: for a folder of its own, or for what only the user can have set.

        Else it would compose the same configuration a second time, which takes longer than most listings.
        """
        is_plain = self.engine.folders == (engines.conf_dir(),) and self.source is None
        return saved_config.has_folder(plan.node) or not is_plain or any("hydra" in word for word in self.overrides)

    def _through_engine(self) -> runs.Outcome:
        outcomes: list[runs.Outcome | Exception] = []

        def task(config: Any) -> None:
            try:
                outcomes.append(runs.start(self._plan(config)))
            except Exception as error:  # the engine would print a line of its own
                outcomes.append(error)

        self.engine.hydra.run(self.engine.config_name, task, [*self.overrides, *engines.QUIET, "hydra.mode=RUN"])
        outcome = outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _script(self, config: Any) -> int:
        """Its commands one after another, each shown as one would type it; ends with the first that fails."""
        _, lines = self.command.load()
        given = self.given
        flags = [f"--config-dir={folder}" for folder in given.config_dir]
        flags += [flag for flag, is_set in (("-q", given.quiet), ("-v", given.verbose)) if is_set]
        for words in lines(config):
            print(f"\n$ mole {shlex.join(words)}", flush=True)
            code = self.perform([*words, *flags])
            if code:
                return code
        return runs.DONE

    def _sweep(self) -> int:
        if self.given.resume:
            raise ValueError("--resume continues one run; it cannot be combined with -m")
        jobs = sweep.expand(self.engine, self.overrides)
        first = self.engine.compose([o for o in jobs[0] if not o.lstrip("+~").startswith("hydra")])
        plan = self._plan(first)
        if not saved_config.has_folder(plan.node):
            raise ValueError(
                f"mole {self.command.name} leaves no run, so that there is nothing to sweep over: leave out -m"
            )
        sweep.check(self.command, self.engine, jobs, plan)
        root = Path(f"{plan.node['run']['folder']}-sweep").expanduser()
        if plan.auto_named:
            root = runs.free(RunFolder(root)).path
        code, table = sweep.run(self.command, self.engine, self.overrides, root, plan.parent)
        print(f"{table}\n{root / sweep.RECORD}")
        return code

    def _plan(self, config: Any) -> runs.Plan:
        """The plan of a composed configuration. Raises ConfigProblems if it holds or reads a secret."""
        raw: Any = OmegaConf.to_container(config, resolve=False)
        found = list(secrets.problems(raw))
        if found:
            raise ConfigProblems(found)
        run_node = raw.get("run")
        folder = run_node.get("folder") if isinstance(run_node, dict) else None
        return runs.Plan(
            self.command,
            engines.plain(config),
            auto_named="${now" in str(folder),
            options={group: self.engine.options(group) for group in self.engine.groups()},
            required=self.engine.required(),
            where=lambda key: self.engine.locate(key, self.overrides),
            comment=lambda key: self.engine.comment(key, self.overrides),
            parent=str(self.given.source) if self.given.source else None,
        )

    def _listing(self) -> list[str]:
        """`--json` for a command that prints a listing."""
        keys = yaml_files.entries(self.engine.primary_file())
        if "format" in keys:
            return ["format=json"]
        raise ValueError(f"mole {self.command.name} prints no listing, so that --json cannot act")

    def _start_from(self, words: Sequence[str]) -> None:
        """Puts a run's saved configuration in the place of the command's own. Raises ValueError."""
        assert self.source is not None
        run = RunFolder(self.source)
        if not run.config.is_file():
            raise ValueError(f"{self.source} is no run: it has no {run.config.name}")
        body, facts = saved_config.read(run.config), run.facts()
        keys, groups = override_words.group_keys(words), self.engine.groups()
        switched = [key for key in keys if key in groups]
        if "experiment" in switched:
            raise ValueError(
                "experiment=… chooses for a whole configuration; with a saved one give its values one by one"
            )
        if facts.get("command", self.command.name) != self.command.name:
            if self.given.resume:
                raise ValueError(f"{self.source} is a run of mole {facts['command']}; continue it with that command")
            body = self._shared(body)
        if self.given.resume:
            refused = [key for key in keys if not saved_config.is_changeable(key)]
            if refused:
                raise ValueError(f"{', '.join(refused)} cannot change when a run goes on; use --from {self.source}")
            body["run"] = {**body.get("run", {}), "folder": str(self.source.absolute()), "resume": "auto"}
        else:  # a folder and a start of its own
            body["run"] = {k: v for k, v in body.get("run", {}).items() if k not in ("folder", "resume")}
        self.engine.saved_run(_escaped(body), switched, run.config)

    def _shared(self, body: dict[str, Any]) -> dict[str, Any]:
        """What another command's saved configuration has for this one; its run is the model, where one is asked for."""
        own = yaml_files.entries(self.engine.primary_file())
        kept = {k: v for k, v in body.items() if k in self.engine.groups() or (k in own and k not in ("name", "run"))}
        if self.source and "model" in own and own["model"].value == "???":
            kept.setdefault("model", str(self.source.absolute()))
        return kept


@contextmanager
def _root_log_kept() -> Iterator[None]:
    """The engine's views set the root logger up for themselves: put back what was there."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


def _escaped(value: Any) -> Any:
    """A resolved value in which no interpolation acts when it is composed again."""
    if isinstance(value, dict):
        return {key: _escaped(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_escaped(v) for v in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
