"""When memory runs out: what is told of it, and the search for the largest micro-batch that fits."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mole.training.batches import TrainingData, plan_layout, to_device
from mole.training.devices import peak_memory
from mole.training.learner import Learner
from mole.training.random_streams import streams_kept
from mole.training.settings import TrainingConfig
from mole.training.step import TrainingFailed

MOMENTS = 2  # that AdamW keeps of each trained weight


class OutOfMemory(TrainingFailed):
    """A device has no room left. The message has what took how much, and the cheapest settings that take less."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, has no memory left."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's allocator on a CPU


@contextmanager
def memory_for(what: str, learner: Learner, settings: TrainingConfig, rows: int, batches: Sequence[Any] = ()):
    """Turns running out of memory inside the body into OutOfMemory: `what` was done, on micro-batches of `rows`."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        length = max((batch["labels"].shape[-1] for batch in batches if batch["labels"].dim() == 2), default=None)
        raise OutOfMemory(_told(what, learner, settings, rows, length)) from error


def _told(what: str, learner: Learner, settings: TrainingConfig, rows: int, length: int | None) -> str:
    device = learner.accelerator.device
    weights = sum(p.numel() * p.element_size() for p in learner.model.parameters())
    learnt = (1 + MOMENTS) * sum(p.numel() * p.element_size() for p in learner.parameters.values())
    of = f" of {rows} × {length:,} tokens" if length else ""
    room = f" of {torch.cuda.mem_get_info(device)[1] / 2**30:.1f} GiB" if device.type == "cuda" else ""
    taken = f"at most {peak_memory(device) / 2**30:.2f} GiB{room} were in use"
    parts = f"weights {weights / 2**30:.2f} GiB, gradients and moments {learnt / 2**30:.2f} GiB"
    return (
        f"out of memory on {device} in {what}{of}: {taken}, {parts}, the rest is kept for the backward pass. "
        f"Cheapest first: {'; '.join(_cheaper(what, learner, settings, rows, length))}. With run.resume=auto the run "
        "goes on from its last checkpoint"
    )


def _cheaper(what: str, learner: Learner, settings: TrainingConfig, rows: int, length: int | None) -> Iterator[str]:
    """Settings that take less, those that cost least first."""
    if "evaluation" in what:
        yield f"training.batch_size={max(1, settings.batch_size // 2)}, by which validation samples go through, too"
    elif rows > 1:
        smaller = next(smaller_sizes(settings.batch_size // learner.accelerator.num_processes, rows))
        yield f"training.micro_batch_size={smaller} or auto (a step stays {settings.batch_size} samples)"
    if not settings.gradient_checkpointing and "evaluation" not in what:
        yield "training.gradient_checkpointing=true"
    if settings.precision == "fp32" and learner.accelerator.device.type == "cuda":
        yield "training.precision=bf16 with backbone.dtype=bfloat16"
    if length and length > 1:
        limit = "training.packing" if settings.packing else "dataset.max_length"
        yield f"{limit}={length // 2} or less"
    yield "a smaller backbone, or more devices"


def smaller_sizes(whole: int, rows: int) -> Iterator[int]:
    """Divisors of `whole` below `rows`, each at most half of the one before, down to 1."""
    while rows > 1:
        rows = next(size for size in range(rows // 2, 0, -1) if whole % size == 0)
        yield rows


def largest_micro_batch(learner: Learner, data: TrainingData, settings: TrainingConfig) -> int:
    """How many of the longest samples go through forward and backward at once on every device: all, or half, or …

    Beside the gradients there is room for the optimizer's moments. Nothing is learnt, drawn or told. Raises OutOfMemory
    if one sample is too much.
    """
    whole = plan_layout(settings, learner.accelerator.num_processes).micro_batch_size
    longest = sorted(range(len(data.train)), key=lambda index: -data.size(data.train[index]))[:whole]
    rows, sizes = whole, smaller_sizes(whole, whole)
    while True:
        batch = data.collate([data.train[longest[i % len(longest)]] for i in range(rows)])
        if _everywhere(learner, _fits(learner, batch)):
            return rows
        if rows == 1:
            with memory_for("the search for a micro-batch", learner, settings, 1, [batch]):
                raise MemoryError
        rows = next(sizes)


def _fits(learner: Learner, batch: dict[str, Any]) -> bool:
    model, accelerator = learner.model, learner.accelerator
    was_training, before = model.training, {name: tensor.clone() for name, tensor in learner.buffers.items()}
    model.train()
    reserved: list[Tensor] = []
    try:
        with streams_kept(), _unheard(model):
            reserved += [torch.empty_like(p) for p in learner.parameters.values() for _ in range(MOMENTS)]
            with accelerator.autocast():
                loss, auxiliary, _ = learner.objective(to_device(batch, accelerator.device))
            (loss if auxiliary is None else loss + auxiliary).backward()
        return True
    except Exception as error:
        if not ran_out(error):
            raise
        return False
    finally:
        reserved.clear()
        for parameter in learner.parameters.values():
            parameter.grad = None
        with torch.no_grad():
            for name, tensor in before.items():
                learner.buffers[name].copy_(tensor)
        model.train(was_training)
        gc.collect()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def _everywhere(learner: Learner, fits: bool) -> bool:
    """Whether it fits on the devices of all processes."""
    accelerator = learner.accelerator
    if accelerator.num_processes == 1:
        return fits
    all_of_them = accelerator.gather(torch.tensor([int(fits)], device=accelerator.device))
    assert isinstance(all_of_them, Tensor)
    return bool(all_of_them.all())


@contextmanager
def _unheard(model: nn.Module) -> Iterator[None]:
    """Nobody is told of the forwards in the body: they are none of the training."""
    names = [name for name in ("listeners", "observers") if isinstance(vars(model).get(name), list)]
    kept = {name: list(getattr(model, name)) for name in names}
    for name in names:
        getattr(model, name).clear()
    try:
        yield
    finally:
        for name in names:
            getattr(model, name)[:] = kept[name]
