"""Who listens while a command trains or evaluates: every so many training forwards go to the routing log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from mole.moe import MoEModel
from mole.routing.log import RoutingLog
from mole.routing.statistics import RoutingStatistics


class TrainingForwards:
    """Passes every n-th training forward on to the routing log; evaluations in between are not logged."""

    def __init__(self, log: RoutingLog, every: int | None):
        self.log, self.every, self.count = log, every, 0

    def record(self, scalings: Tensor, *, phase: str, **facts: Any) -> None:
        """As `RoutingLog.record`."""
        if phase != "train" or self.every is None:
            return
        if self.count % self.every == 0:
            self.log.record(scalings, phase=phase, **facts)
        self.count += 1


@contextmanager
def listening(model: Any, listener: Any) -> Iterator[None]:
    """`listener` is told of every forward of the body; None: nobody is."""
    if listener is None:
        yield
        return
    model.listeners.append(listener)
    try:
        yield
    finally:
        model.listeners.remove(listener)


@contextmanager
def observing(model: Any) -> Iterator[RoutingStatistics]:
    """Statistics of the body's evaluations, and of how generation reads its prompts."""
    tasks = () if isinstance(model, MoEModel) else model.shape.expert_tasks
    counted = ("eval", "prefill")
    found = RoutingStatistics(model.sites, model.expert_names, tasks, warns=False, phases=counted)
    model.observers.append(found)
    try:
        yield found
    finally:
        model.observers.remove(found)


def texts_of(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token by itself."""
    return [tokenizer.decode([token]) for token in ids]
