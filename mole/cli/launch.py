"""One process, several on this machine, or one of those that torchrun or srun started: the same worker.

Workers read the run's config.yaml and compose nothing. With several processes only the parent acts on signals; torch's
elastic agent passes them on.
"""

import dataclasses
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mole import host
from mole.command import Command
from mole.config import saved as saved_config
from mole.config.checks import validate
from mole.log import log_file, start_log
from mole.run_folder import RunFolder, RunStopped, write_atomically

GRACE = 300  # seconds that workers have to finish a step and write a checkpoint after a signal


@dataclasses.dataclass(frozen=True)
class Work:
    """What a worker is told: a command, the folder of its run, how much of the log it shows."""

    command: Command
    folder: str
    level: int = logging.INFO


class WorkerFailed(Exception):
    """A worker raised: its rank, the error's type and message, all tracebacks; `is_input`: ValueError or OSError."""

    def __init__(self, rank: int, kind: str, message: str, trace: str, is_input: bool):
        super().__init__(message)
        self.rank, self.kind, self.message, self.trace, self.is_input = rank, kind, message, trace, is_input


def is_outer() -> bool:
    """Whether somebody else (torchrun, `accelerate launch`, srun) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def count_processes(node: dict[str, Any]) -> int:
    """How many processes a configuration asks for: `launcher.num_processes`, or one for each visible GPU."""
    launcher = node.get("launcher")
    if launcher is None:
        return 1
    if launcher.get("num_processes"):
        return launcher["num_processes"]
    device = (node.get("backbone") or {}).get("device", "auto")
    if device not in ("auto", "cuda"):  # one named device, or the CPU: nothing to spread over
        return 1
    import torch

    return max(1, torch.cuda.device_count())  # counts, and does not initialise CUDA


def run_worker(work: Work) -> Any:
    """What every process does: reads the run's configuration, checks it again, calls the command's `run`."""
    run = RunFolder(work.folder)
    schema, function = work.command.load()
    config = validate(schema, saved_config.read(run.config))
    if config.run.deterministic:
        _be_deterministic()
    with log_file(run.log):
        return function(config)


def run_several(work: Work, count: int) -> Any:
    """Runs the worker in `count` processes of this machine; returns what rank 0's `run` returned.

    Raises WorkerFailed for the first that failed, and RunStopped if the run was stopped by a signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [n for n in logging.root.manager.loggerDict if n.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own; its news are told by us
    settings: dict[str, Any] = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": count,
        "run_id": f"mole-{os.getpid()}-{time.monotonic_ns()}",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "max_restarts": 0,
        "start_method": "spawn",
        "monitor_interval": 0.1,
    }
    if "shutdown_timeout" in {field.name for field in dataclasses.fields(LaunchConfig)}:
        settings["shutdown_timeout"] = GRACE
    run = RunFolder(work.folder)
    with _environment(count), _signals_kept():
        try:
            answers = elastic_launch(LaunchConfig(**settings), _spawned)(work, os.getpid())
        except SignalException as error:
            done = run.complete_checkpoints()
            raise RunStopped(int(error.sigval), done[-1] if done else None) from None
        except ChildFailedError as error:
            raise _first_failure(run, error) from None
        finally:
            failures = {f: f.read_text(encoding="utf-8") for f in run.path.glob(".failed-rank-*")}
            for file in failures:
                file.unlink()
    answer = answers[0]
    if "stopped" in answer:
        raise RunStopped(answer["stopped"], Path(answer["checkpoint"]) if answer["checkpoint"] else None)
    return answer["value"]


def _spawned(work: Work, parent: int) -> dict[str, Any]:
    """The worker as torch's agent starts it, in a process of its own."""
    rank = int(os.environ["RANK"])
    os.setpgrp()  # Ctrl-C in a terminal goes to a whole group: only the parent may hear it
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    start_log(work.level if rank == 0 else max(work.level, logging.WARNING))
    try:
        return {"value": run_worker(work)}
    except RunStopped as stopped:
        return {"stopped": stopped.signal_number, "checkpoint": stopped.checkpoint and str(stopped.checkpoint)}
    except Exception as error:
        report = {
            "kind": type(error).__name__,
            "message": describe(error),
            "trace": traceback.format_exc(),
            "is_input": is_input_error(error),
        }
        write_atomically(_failure_file(RunFolder(work.folder), rank), json.dumps(report))
        raise
    finally:
        leave_group()


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, killed by something that nobody could pass on."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _first_failure(run: RunFolder, error: Any) -> WorkerFailed:
    rank, failure = error.get_first_failure()
    traces = []
    first: dict[str, Any] | None = None
    for file in sorted(run.path.glob(".failed-rank-*")):
        report = json.loads(file.read_text(encoding="utf-8"))
        number = file.name.rpartition("-")[2]
        traces.append(f"rank {number}:\n{report['trace']}")
        if int(number) == rank:
            first = report
    if first is None:  # killed, or it failed outside our code
        message = failure.message if isinstance(failure.message, str) else str(failure.message.get("message"))
        ended = (
            f"ended with code {failure.exitcode}" if failure.exitcode >= 0 else f"killed by signal {-failure.exitcode}"
        )
        first = {"kind": "", "message": f"{ended}: {message}", "trace": message, "is_input": False}
        traces.append(f"rank {rank}: {first['message']}")
    return WorkerFailed(rank, first["kind"], first["message"], "\n".join(traces), first["is_input"])


def _failure_file(run: RunFolder, rank: int) -> Path:
    return run.path / f".failed-rank-{rank}"


def share(node: dict[str, Any] | None) -> dict[str, Any]:
    """Under an outer launcher: rank 0's configuration, for all ranks. Rank 0 gives None if it has none to give.

    Raises ValueError if `launcher.num_processes` is not the number of processes that were started, or if rank 0 failed.
    """
    import torch
    import torch.distributed as distributed

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    box = [node]
    distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[0] is None:
        raise ValueError("rank 0 could not prepare the run" if rank else "the run could not be prepared")
    asked = (box[0].get("launcher") or {}).get("num_processes")
    if asked not in (None, world):
        raise ValueError(
            f"launcher.num_processes={asked}, but {world} processes were started; leave it out under torchrun, "
            f"or start with torchrun --nproc-per-node {asked}"
        )
    return box[0]


def describe(error: BaseException) -> str:
    """An error's message as the user should read it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__


def is_input_error(error: BaseException) -> bool:
    """Whether an error is of the kind that the user's input causes, if it comes before the first step."""
    return isinstance(error, ValueError | OSError)


@contextmanager
def _environment(count: int) -> Iterator[None]:
    """What the workers should find in their environment, unless the user has set it."""
    import torch

    wanted = {"OMP_NUM_THREADS": str(max(1, host.available_processors() // count))}
    if not torch.cuda.is_available():
        wanted["ACCELERATE_USE_CPU"] = "true"
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Puts back the signal handlers that torch's agent replaces."""
    names = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]
    before = {number: signal.getsignal(number) for number in names}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _be_deterministic() -> None:
    """Deterministic kernels: the same bits again on the same machine, slower on a GPU."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def leave_group() -> None:
    """Leaves the process group that this process joined, if it joined one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a wrapped model that outlives the group keeps its threads, which then meet Python's own end
        distributed.destroy_process_group()
