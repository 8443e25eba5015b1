"""`mole quickstart`: the whole way on generated tasks: experts, a library, an X-LoRA mixture, a table, text, plots."""

from typing import Annotated, Literal

from pydantic import Field

from mole.registry import config_dataclass

Task = Literal["arithmetic", "cipher", "consonants", "initials", "reverse", "shouting", "sorting"]


@config_dataclass
class Quickstart:
    """Which tasks, and how long each part trains."""

    folder: str
    tasks: Annotated[tuple[Task, ...], Field(min_length=2)] = (
        "arithmetic",
        "reverse",
        "shouting",
        "cipher",
        "consonants",
    )
    expert_steps: Annotated[int, Field(ge=1)] = 90
    router_steps: Annotated[int, Field(ge=1)] = 420
    seed: int = 0

    def __post_init__(self):
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks: {', '.join(self.tasks)} names a task twice")


def lines(config: Quickstart) -> list[list[str]]:
    """The commands, as words without the leading `mole`; run in order, each leaves its own run in the folder."""
    folder = config.folder
    every = f"dataset=[{','.join(config.tasks)}]"
    short = ["training.epochs=null", "training.evaluate_every=null", "training.checkpoint_every=null"]
    experts = [
        [
            "train-expert",
            "backbone=tiny",
            "adapter=lora",
            f"dataset={task}",
            f"name={task}",
            f"library={folder}/library",
            f"training.max_steps={config.expert_steps}",
            "training.batch_size=24",
            "training.learning_rate=5e-3",
            *short,
            f"seed={config.seed}",
            f"run.folder={folder}/{task}",
        ]
        for task in config.tasks
    ]
    mixture = [
        "xlora-train",
        "backbone=tiny",
        f"library={folder}/library",
        every,
        "router.depth=2",
        "router.size=512",
        "router.dropout=0.0",
        f"training.max_steps={config.router_steps}",
        "training.batch_size=16",
        "training.learning_rate=6e-3",
        *short,
        f"seed={config.seed}",
        f"run.folder={folder}/mixture",
    ]
    evaluate = [
        "evaluate",
        "backbone=tiny",
        every,
        f"model={folder}/mixture",
        "metric=exact_match",
        "limit=100",
        f"seed={config.seed}",
        f"run.folder={folder}/evaluation",
    ]
    generate = [
        "generate",
        "backbone=tiny",
        f"model={folder}/mixture",
        every,
        "limit=1",
        "log=true",
        f"seed={config.seed}",
        f"run.folder={folder}/text",
    ]
    return [*experts, mixture, evaluate, generate, ["plot", f"{folder}/text"]]
