"""What a user can set about training, and what `fit` reads of a command's config."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from mole.registry import config_dataclass
from mole.training.optimizers import AdamWConfig
from mole.training.schedules import LinearConfig
from mole.training.trackers import NoneConfig

Count = Annotated[int, Field(ge=1)]


@config_dataclass
class TrainingConfig:
    """How long, how much at once, how fast, and what is looked at on the way."""

    name: Literal["default"] = "default"
    max_steps: Annotated[int, Field(ge=0)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = 3.0
    batch_size: Count = 16
    micro_batch_size: Count | Literal["auto"] | None = None
    group_by_length: bool = False
    packing: Annotated[int, Field(ge=2)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    log_every: Count = 1
    evaluate_every: Count | None = 100
    checkpoint_every: Count | None = 100
    keep_checkpoints: Count = 2
    validation_examples: Count | None = None
    samples: Count | None = None
    best_metric: str | None = "auto"
    best_direction: Literal["auto", "min", "max"] = "auto"
    early_stopping_patience: Count | None = None
    early_stopping_gain: Annotated[float, Field(ge=0)] = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.max_steps is None and self.epochs is None:
            problems.append("training.max_steps and training.epochs are both null: set one of them")
        if self.max_steps == 0:
            problems.append(
                "training.max_steps=0 trains nothing: set 1 or more, or null for epochs; surgery alone is mole moefy "
                "train=none"
            )
        if isinstance(self.micro_batch_size, int) and self.batch_size % self.micro_batch_size:
            problems.append(
                f"training.batch_size={self.batch_size} is not a multiple of "
                f"training.micro_batch_size={self.micro_batch_size}: "
                f"set batch_size={' or '.join(map(str, neighbours(self.batch_size, self.micro_batch_size)))}"
            )
        if self.packing and self.group_by_length:
            problems.append("training.group_by_length has nothing to group with training.packing: set one of them")
        if self.early_stopping_patience is not None and self.best_metric is None:
            problems.append("training.early_stopping_patience needs training.best_metric: name a metric, or auto")
        if self.early_stopping_patience is not None and self.evaluate_every is None:
            problems.append("training.early_stopping_patience needs training.evaluate_every: set a number of steps")
        if self.early_stopping_gain and self.early_stopping_patience is None:
            problems.append("training.early_stopping_gain acts only with training.early_stopping_patience: set both")
        if problems:
            raise ValueError("\n".join(problems))


@config_dataclass
class RouterTrainingConfig(TrainingConfig):
    """The same for a router over frozen experts: it is small and starts from nothing, so faster and shorter."""

    name: Literal["router"] = "router"  # type: ignore[assignment]
    epochs: Annotated[float, Field(gt=0)] | None = 1.0
    batch_size: Count = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3


AnyTraining = Annotated[TrainingConfig | RouterTrainingConfig, Field(discriminator="name")]


def neighbours(number: int, divisor: int) -> list[int]:
    """The multiples of `divisor` next to `number`, at most two, none below `divisor`."""
    below = number // divisor * divisor
    return [multiple for multiple in (below, below + divisor) if multiple]


class TrainingSettings(Protocol):
    """What `fit` reads of a command's config: the fields of these four groups."""

    @property
    def training(self) -> TrainingConfig: ...
    @property
    def optimizer(self) -> Any: ...
    @property
    def schedule(self) -> Any: ...
    @property
    def tracker(self) -> Any: ...


@dataclass(frozen=True)
class Recipe:
    """The four groups by themselves, for callers of `fit` that are no command."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: Any = field(default_factory=AdamWConfig)
    schedule: Any = field(default_factory=LinearConfig)
    tracker: Any = field(default_factory=NoneConfig)
