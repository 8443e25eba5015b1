"""The main job in process, small: what the tests of the commands share."""

from pathlib import Path

from mole.cli.main import main

SMALL = ["backbone=tiny", "backbone.device=cpu"]
SHORT = [
    "training.max_steps=4",
    "training.batch_size=4",
    "training.evaluate_every=null",
    "training.checkpoint_every=null",
    "training.log_every=2",
]


def data(*tasks: str) -> list[str]:
    """Several generated tasks with few examples each."""
    few = ["examples=24", "validation_examples=4", "test_examples=4"]
    if len(tasks) == 1:
        return [f"dataset={tasks[0]}", *(f"dataset.{setting}" for setting in few)]
    settings = [f"datasets.{task}.{setting}" for task in tasks for setting in few]
    return [f"dataset=[{','.join(tasks)}]", *settings]


def mole(*words: str) -> None:
    """A command that has to succeed."""
    code = main(list(words))
    assert code == 0, f"mole {' '.join(words)} ended with {code}"


def train(task: str, library: Path, folder: Path, *words: str) -> None:
    """A barely trained expert in `library`."""
    mole(
        "train-expert",
        *SMALL,
        *SHORT,
        *data(task),
        f"name={task}",
        f"library={library}",
        f"run.folder={folder}",
        *words,
    )


def files(folder: Path) -> set[str]:
    """Every file under `folder`, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
