"""Which samples an optimizer step sees, and how they are cut into micro-batches over the processes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mole.training.settings import TrainingConfig, neighbours


@dataclass(frozen=True)
class TrainingData:
    """Samples, how several become a batch of tensors, and the order of each epoch (a permutation of all).

    `size` is what a sample weighs in memory, to find the largest ones.
    """

    train: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, Any]]
    order: Callable[[int], list[int]]
    size: Callable[[Any], int] = len


@dataclass(frozen=True)
class Layout:
    """`batch_size` samples a step = `micro_batch_size` × `accumulation` × `num_processes`."""

    batch_size: int
    micro_batch_size: int
    num_processes: int

    @property
    def accumulation(self) -> int:
        """Micro-batches that each process sees in a step."""
        return self.batch_size // (self.micro_batch_size * self.num_processes)


def plan_layout(config: TrainingConfig, num_processes: int) -> Layout:
    """How a step is cut up; with `micro_batch_size=auto` as with none. Raises ValueError where it does not divide.

    The message has the nearest sizes that do.
    """
    asked = config.micro_batch_size if isinstance(config.micro_batch_size, int) else None
    unit = (asked or 1) * num_processes
    if config.batch_size % unit:
        of = f"{num_processes} processes"
        if asked is not None:
            of = f"training.micro_batch_size={asked} on {of}"
        near = " or ".join(str(size) for size in neighbours(config.batch_size, unit))
        raise ValueError(
            f"training.batch_size={config.batch_size} does not divide into {of}: set training.batch_size={near}"
        )
    micro = asked or config.batch_size // num_processes
    return Layout(config.batch_size, micro, num_processes)


def total_steps(config: TrainingConfig, num_samples: int) -> int:
    """Optimizer steps of the run: what ends first of `max_steps` and `epochs`."""
    ends = [] if config.max_steps is None else [config.max_steps]
    if config.epochs is not None:
        ends.append(math.ceil(config.epochs * num_samples / config.batch_size))
    return min(ends)


class SampleStream:
    """Epoch after epoch as one endless row of samples; step s takes the s-th `batch_size` of them.

    What a step sees is a function of its number alone: neither the number of processes nor a restart changes it.
    A batch at the end of an epoch is filled from the next.
    """

    def __init__(self, data: TrainingData, layout: Layout):
        if not len(data.train):
            raise ValueError("the training split has no sample: give a dataset with at least one")
        self.data, self.layout = data, layout
        self._orders: dict[int, list[int]] = {}

    def indices(self, step: int) -> list[int]:
        """Indices of the samples of optimizer step `step`, counted from 1."""
        size, length = self.layout.batch_size, len(self.data.train)
        found = [divmod(position, length) for position in range((step - 1) * size, step * size)]
        epochs = {epoch for epoch, _ in found}
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in sorted(epochs)}
        return [self._orders[epoch][place] for epoch, place in found]

    def _order(self, epoch: int) -> list[int]:
        order = list(self.data.order(epoch))
        assert len(order) == len(self.data.train), "the order of an epoch has every sample once"
        return order

    def epoch(self, step: int) -> float:
        """Epochs seen after optimizer step `step`."""
        return step * self.layout.batch_size / len(self.data.train)

    def micro_batches(self, step: int, rank: int) -> list[dict[str, Any]]:
        """The batches that process `rank` sees in optimizer step `step`, collated, on the CPU."""
        indices, size, world = self.indices(step), self.layout.micro_batch_size, self.layout.num_processes
        starts = [(turn * world + rank) * size for turn in range(self.layout.accumulation)]
        return [self.data.collate([self.data.train[i] for i in indices[start : start + size]]) for start in starts]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; everything else passes through."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
