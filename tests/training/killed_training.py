"""Trains the toy in child processes that get SIGKILL, and goes on each time: `python killed_training.py FOLDER MODE N`.

MODE "event": a new run for each of N moments spread over all its file operations: the child kills itself just before
that operation, and the next child goes on. MODE "time": one run, killed N times at random moments. Prints one JSON
object: for each run the step that its last start went on from, its weights' digest and its metrics without times.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from training_toy import ToyModel, fit_toy, lines, mean_loss, recipe, toy_data, weight_bytes

from mole.training.optimizers import AdamWConfig
from mole.training.schedules import CosineConfig

FILE_OPERATIONS = {
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "shutil.rmtree",
    "os.scandir",
}


def train(folder: Path, steps: int) -> None:
    """One start of the run; leaves `weights` beside the run when it gets to its end."""
    model, data = ToyModel(dropout=0.3), toy_data(20)
    config = recipe(
        max_steps=steps,
        batch_size=6,
        micro_batch_size=3,
        learning_rate=0.05,
        optimizer=AdamWConfig(),
        schedule=CosineConfig(),
        evaluate_every=4,
        checkpoint_every=3,
        best_metric="validation_loss",
    )
    fit_toy(
        model,
        folder,
        config,
        data,
        evaluate=lambda step: {"validation_loss": mean_loss(model, data.train[:4])},
        resume=True,
    )
    folder.with_suffix(".weights").write_bytes(weight_bytes(model))


def in_child(work: Callable[[], None], delay: float | None = None) -> int:
    """Runs `work` in a child; SIGKILL after `delay` seconds. Returns the signal that ended it, 0 for a good end."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return 0


def train_counting(folder: Path, steps: int, fatal: int | None) -> None:
    """`train`, killed just before its file operation number `fatal`; without one, leaves their number in a file."""
    seen = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event in FILE_OPERATIONS and str(folder) in str(arguments[0] if arguments else ""):
            seen[0] += 1
            if seen[0] == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    train(folder, steps)
    folder.with_suffix(".events").write_text(str(seen[0]))


def outcome(folder: Path) -> dict:
    """What a run came to."""
    digest = hashlib.sha256(folder.with_suffix(".weights").read_bytes()).hexdigest()
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    hidden = [path.name for path in folder.rglob(".*")]
    return {"weights": digest, "metrics": lines(folder), "checkpoints": left, "hidden": hidden}


def main(root: Path, mode: str, kills: int) -> dict:
    """Prints nothing; returns what to print."""
    whole = root / "whole"
    steps = 8 if mode == "event" else 40
    began = time.monotonic()
    in_child(lambda: train_counting(whole, steps, None))
    seconds = time.monotonic() - began
    found = {"whole": outcome(whole), "killed": [], "kills": 0}
    if mode == "event":
        events = int(whole.with_suffix(".events").read_text())
        for turn in range(kills):
            folder, fatal = root / f"killed-{turn}", 1 + turn * events // kills
            found["kills"] += in_child(lambda f=folder, n=fatal: train_counting(f, steps, n)) == signal.SIGKILL
            in_child(lambda f=folder: train(f, steps))
            found["killed"].append({"event": fatal, **outcome(folder)})
        return found
    draw = random.Random(0)
    while not found["kills"]:  # a run that ended before its first kill shows nothing: another one, killed sooner
        folder = root / f"killed-{len(found['killed'])}"
        for _ in range(kills):
            delay = draw.uniform(0.1 * seconds, seconds / 2)
            found["kills"] += in_child(lambda f=folder: train(f, steps), delay) == signal.SIGKILL
        in_child(lambda f=folder: train(f, steps))
        found["killed"].append(outcome(folder))
        seconds /= 2
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
