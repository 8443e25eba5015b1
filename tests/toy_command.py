"""A command for tests, with what all commands have: groups, a run folder, a launcher. Its name says what it does."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mole.cli import main as cli
from mole.command import Command
from mole.config.nodes import LauncherConfig, RunConfig
from mole.registry import config_dataclass
from mole.run_folder import RunFolder, RunStopped, write_atomically

CONF = Path(__file__).with_name("toy_conf")


@config_dataclass
class Sweet:
    name: Literal["sweet"] = "sweet"
    sugar: Annotated[int, Field(ge=0)] = 2
    layers: tuple[str, ...] | str = "all"
    extras: dict[str, float] = Field(default_factory=dict)


@config_dataclass
class Sour:
    name: Literal["sour"] = "sour"
    lemons: Annotated[int, Field(ge=1)] = 1


@config_dataclass
class Cream:
    name: Literal["cream"] = "cream"


@config_dataclass
class Nuts:
    name: Literal["nuts_chopped"] = "nuts_chopped"
    path: str


@config_dataclass
class Training:
    max_steps: Annotated[int, Field(ge=1)] = 3
    learning_rate: Annotated[float, Field(gt=0)] = 0.5


Topping = Annotated[Cream | Nuts, Field(discriminator="name")]


@config_dataclass
class Toy:
    flavour: Annotated[Sweet | Sour, Field(discriminator="name")]
    topping: Topping | None = None
    toppings: dict[str, Topping] = Field(default_factory=dict)
    launcher: LauncherConfig
    spices: dict[str, float] = Field(default_factory=dict)
    name: str = "cake"
    seed: int = 0
    hub_token_file: str | None = None
    training: Training
    run: RunConfig

    def __post_init__(self):
        if self.flavour.name == "sweet" and self.flavour.sugar > 100 * self.training.max_steps:
            raise ValueError("flavour.sugar is above 100 * training.max_steps: lower it or raise training.max_steps")
        if self.topping is None and not self.toppings:
            raise ValueError("topping: not chosen; choose one: topping=cream, topping=nuts_chopped")


def run(config: Toy) -> float:
    """Goes wrong as its name says; else leaves metrics and returns the rate times the steps."""
    folder = RunFolder(config.run.folder)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if config.name == "early":
        raise ValueError("no flour in the house; buy some")
    folder.update(status="running", ranks=world)
    if config.name == "late" and rank == world - 1:
        raise RuntimeError(f"burnt, with {os.environ.get('TOY_TOKEN')} in it")
    if config.name == "input":
        raise ValueError("burnt by a value")
    checkpoint = folder.checkpoint(1)
    if config.name in ("wait", "dawdle", "stop"):
        if rank == 0 and config.name != "dawdle":
            checkpoint.mkdir(parents=True, exist_ok=True)
            write_atomically(checkpoint / "complete", "")
        if config.name == "stop":
            raise RunStopped(signal.SIGTERM, checkpoint)
        write_atomically(folder.path / f"waiting-{rank}", str(os.getpid()))
        while True:
            time.sleep(0.05)
    with open(folder.metrics, "a") as file:
        file.write(json.dumps({"rank": rank, "world": world, "threads": os.environ.get("OMP_NUM_THREADS")}) + "\n")
    return config.training.learning_rate * config.training.max_steps


COMMANDS = {"toy": Command("toy", "a cake", "train", ("name",), module="toy_command")}


def main(*words: str) -> int:
    return cli.main([*words, "--config-dir", str(CONF)], COMMANDS)


if __name__ == "__main__":
    import toy_command  # workers find the classes there, not in __main__

    sys.exit(toy_command.main(*sys.argv[1:]))
