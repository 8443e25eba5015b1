"""Schedules: the learning rate over the run, as a factor on `training.learning_rate`; made by transformers."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import optimization

from mole.registry import SCHEDULES, config_dataclass

Share = Annotated[float, Field(ge=0, lt=1)]
Warmup = Annotated[int, Field(ge=0)] | Share  # a whole number of steps, or a share of the run


@config_dataclass
class ConstantConfig:
    """The same rate throughout."""

    name: Literal["constant"] = "constant"


@config_dataclass
class ConstantWithWarmupConfig:
    """Up to the rate, then the same throughout."""

    name: Literal["constant_with_warmup"] = "constant_with_warmup"
    warmup: Warmup = 0.1


@config_dataclass
class LinearConfig:
    """Up to the rate, then down to 0 in a straight line."""

    name: Literal["linear"] = "linear"
    warmup: Warmup = 0.05


@config_dataclass
class CosineConfig:
    """Up to the rate, then down along half a cosine, to 0 or to a floor."""

    name: Literal["cosine"] = "cosine"
    warmup: Warmup = 0.05
    floor: Share = 0.0


@config_dataclass
class WarmupStableDecayConfig:
    """Up to the rate, level, then down at the end."""

    name: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    warmup: Warmup = 0.05
    decay_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    floor: Share = 0.0


@config_dataclass
class InverseSqrtConfig:
    """Up to the rate, then down with the square root of the steps."""

    name: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup: Warmup = 0.05


def warmup(config: Any, total: int) -> int:
    """Steps of warm-up in a run of `total` steps. Raises ValueError if nothing is left after them."""
    steps = config.warmup if isinstance(config.warmup, int) else round(config.warmup * total)
    if steps and steps >= total:
        raise ValueError(
            f"schedule.warmup={config.warmup} leaves nothing of a run of {total} steps: "
            f"lower it, give a share such as 0.1, or train longer"
        )
    return steps


@SCHEDULES.register("constant", ConstantConfig)
def constant(config: ConstantConfig, optimizer: Optimizer, total: int) -> LambdaLR:
    """Factor 1."""
    return optimization.get_constant_schedule(optimizer)


@SCHEDULES.register("constant_with_warmup", ConstantWithWarmupConfig)
def constant_with_warmup(config: ConstantWithWarmupConfig, optimizer: Optimizer, total: int) -> LambdaLR:
    """0 → 1, then 1."""
    return optimization.get_constant_schedule_with_warmup(optimizer, warmup(config, total))


@SCHEDULES.register("linear", LinearConfig)
def linear(config: LinearConfig, optimizer: Optimizer, total: int) -> LambdaLR:
    """0 → 1 → 0."""
    return optimization.get_linear_schedule_with_warmup(optimizer, warmup(config, total), total)


@SCHEDULES.register("cosine", CosineConfig)
def cosine(config: CosineConfig, optimizer: Optimizer, total: int) -> LambdaLR:
    """0 → 1 → floor."""
    return optimization.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup(config, total), total, min_lr_rate=config.floor
    )


@SCHEDULES.register("warmup_stable_decay", WarmupStableDecayConfig)
def warmup_stable_decay(config: WarmupStableDecayConfig, optimizer: Optimizer, total: int) -> LambdaLR:
    """0 → 1, 1, 1 → floor."""
    steps, decay = warmup(config, total), max(1, round(config.decay_share * total))
    if steps + decay > total:
        raise ValueError(
            f"schedule: {steps} steps of warm-up and {decay} of decay do not fit a run of {total}: "
            f"lower schedule.warmup or schedule.decay_share"
        )
    return optimization.get_wsd_schedule(
        optimizer,
        num_warmup_steps=steps,
        num_decay_steps=decay,
        num_training_steps=total,
        min_lr_ratio=config.floor,
        decay_type="linear",
    )


@SCHEDULES.register("inverse_sqrt", InverseSqrtConfig)
def inverse_sqrt(config: InverseSqrtConfig, optimizer: Optimizer, total: int) -> LambdaLR:
    """0 → 1, then 1 over the square root of steps / warm-up."""
    steps = warmup(config, total)
    if not steps:
        raise ValueError("schedule=inverse_sqrt needs a warm-up: set schedule.warmup, in steps or as a share")
    return optimization.get_inverse_sqrt_schedule(optimizer, steps, timescale=steps)


def build_schedule(config: Any, optimizer: Optimizer, total: int) -> LambdaLR:
    """The schedule that `config.name` names, for a run of `total` optimizer steps."""
    return SCHEDULES.build(config, optimizer, total)


def summed_factors(config: Any, total: int) -> float:
    """Σ over a run of `total` steps of what the schedule makes of a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    (factor,) = build_schedule(config, optimizer, total).lr_lambdas
    return float(sum(factor(step) for step in range(total)))
