"""One optimizer step: all its micro-batches on all processes, weighted by tokens, as if they were one batch."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mole.training.batches import to_device
from mole.training.learner import Learner
from mole.training.loss import supervised_tokens, valid_tokens

Batches = list[dict[str, Any]]


class TrainingFailed(RuntimeError):
    """Training cannot go on: the loss is not finite, or nothing learns."""


@dataclass(frozen=True)
class Census:
    """What all processes bring to a step: supervised tokens or texts, all real tokens, the signal that asks to stop."""

    supervised: int
    valid: int
    signal_number: int


@dataclass(frozen=True)
class StepReport:
    """What a step did. `loss`: per supervised token or text; `auxiliary`: per token, by name.

    `skipped`: fp16 overflowed. `auxiliary` has the sum that was trained on as auxiliary_loss, and its parts as
    loss/<name>.
    """

    loss: float
    auxiliary: dict[str, float]
    gradient_norm: float
    learning_rate: float
    skipped: bool


def take_census(learner: Learner, batches: Batches, signal_number: int) -> Census:
    """Counts a step before it is done; every process gets the same answer."""
    supervised = sum(supervised_tokens(batch["labels"]) for batch in batches)
    valid = sum(valid_tokens(batch) for batch in batches)
    accelerator = learner.accelerator
    if accelerator.num_processes > 1:
        mine = torch.tensor([[supervised, valid, signal_number]], device=accelerator.device)
        all_of_them = accelerator.gather(mine)
        assert isinstance(all_of_them, Tensor)
        supervised, valid = (int(n) for n in all_of_them[:, :2].sum(0))
        signal_number = int(all_of_them[:, 2].max())
    return Census(supervised, valid, signal_number)


def take_step(learner: Learner, batches: Batches, census: Census, clip_norm: float | None, first: bool) -> StepReport:
    """Forward, backward, clip, update. Raises TrainingFailed where the loss is not finite or nothing gets a gradient.

    loss = Σ token losses / Σ supervised tokens, both sums over micro-batches and processes; where a head says something
    of whole texts, they count in the place of tokens. A model's auxiliary loss is averaged over tokens likewise.
    """
    if not census.supervised:
        raise TrainingFailed("nothing in this step is supervised: all its labels are -100")
    accelerator, optimizer = learner.accelerator, learner.optimizer
    optimizer.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    auxiliary: dict[str, Tensor] = {}
    for batch in batches:
        loss, parts = _one_batch(learner, batch, census)
        total += loss
        for name, part in parts.items():
            auxiliary[name] = auxiliary.get(name, 0.0) + part
    mean = _summed(learner, total)
    _require_finite("loss", mean)
    learner.sum_gradients()
    rate = learner.learning_rate
    norm = accelerator.clip_grad_norm_(learner.clipped, math.inf if clip_norm is None else clip_norm)
    if accelerator.scaler is None:  # fp16: its scaler skips a step that overflowed, and lowers the scale
        _require_finite("gradient's norm", float(norm))  # type: ignore[arg-type]
        if first:
            check_gradients(learner)
    optimizer.step()
    if not optimizer.step_was_skipped:
        learner.schedule.step()
    return StepReport(
        loss=mean,
        auxiliary={name: _summed(learner, value) for name, value in auxiliary.items()},
        gradient_norm=float(norm),  # type: ignore[arg-type]
        learning_rate=rate,
        skipped=optimizer.step_was_skipped,
    )


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise TrainingFailed(
            f"the {what} is {value}: lower training.learning_rate, set training.clip_norm, or use "
            f"training.precision=fp32; the weights before this step are kept"
        )


def _one_batch(learner: Learner, batch: dict[str, Any], census: Census) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of one micro-batch; its share of the step's loss and auxiliary losses, on the CPU."""
    accelerator = learner.accelerator
    with accelerator.autocast():
        token_losses, auxiliary, parts = learner.objective(to_device(batch, accelerator.device))
    share, of_tokens = token_losses / census.supervised, valid_tokens(batch) / census.valid
    accelerator.backward(share if auxiliary is None else share + auxiliary * of_tokens)
    named = {f"loss/{name}": part for name, part in parts.items()}
    if auxiliary is not None:
        named["auxiliary_loss"] = auxiliary
    return _noted(share), {name: _noted(part * of_tokens) for name, part in named.items()}


def _noted(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64)


def _summed(learner: Learner, value: Tensor) -> float:
    """The sum over all processes."""
    accelerator = learner.accelerator
    if accelerator.num_processes > 1:
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        return float(accelerator.reduce(value.to(accelerator.device, dtype), "sum"))  # type: ignore[arg-type]
    return float(value)


def check_gradients(learner: Learner) -> None:
    """After the first backward pass: something learns, and only what should. Raises TrainingFailed."""
    silent = [name for name, p in learner.parameters.items() if p.grad is None or not bool(p.grad.any())]
    if len(silent) == len(learner.parameters):
        raise TrainingFailed(
            f"no trainable parameter gets a gradient (the first: {silent[0]}): the loss does not depend on them; "
            f"check what is trainable and where the adapters sit"
        )
    frozen = [n for n, p in learner.model.named_parameters() if p.grad is not None and n not in learner.parameters]
    if frozen:
        raise TrainingFailed(f"{frozen[0]} is frozen but has a gradient: another training step left it there")
