"""What forwards leave with a block until somebody asks: the latest routing, losses with their graph, counts of slots.

Nothing of it is part of the block's state: copies and pickles of a block start with an empty one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mole.moe.latest import Latest


class Ledger:
    """Of one block.

    `latest`  of the last forward, None before the first.
    `losses`  by name, without graph, not weighted; of the last forward of training.
    `counts`  int64 [E] slots of forwards in training since `take_counts`.
    """

    def __init__(self):
        self.latest: Latest | None = None
        self.losses: dict[str, Tensor] = {}
        self.counts: Tensor | None = None
        self.had_grad = True
        self._pending: list[Tensor] = []
        self._frame: Any = None
        self._step: tuple[Any, Tensor] | None = None

    def owe(self, loss: Tensor | None, frame: Any) -> None:
        """Keeps a forward's weighted loss until it is asked for; those of an earlier forward of the model go."""
        if frame is None or frame is not self._frame:
            self._pending = []
        self._frame = frame
        if loss is not None:
            self._pending.append(loss)

    @property
    def owed(self) -> list[Tensor]:
        """The weighted losses that were not taken."""
        return self._pending

    def take(self) -> list[Tensor]:
        """The same, once."""
        found, self._pending = self._pending, []
        return found

    def count(self, slots: Tensor) -> None:
        """Adds the slots [E] of a forward of training."""
        self.counts = slots if self.counts is None else self.counts.to(slots.device) + slots

    def take_counts(self) -> Tensor | None:
        """The slots counted since the last call."""
        found, self.counts = self.counts, None
        return found

    def in_step(self, slots: Tensor, step: Any, again: bool) -> Tensor:
        """The slots [E] of this optimizer step so far, this forward's among them; `step` changes with the weights.

        A recomputation finds the sum as it is.
        """
        if self._step is None or self._step[0] != step:
            self._step = (step, torch.zeros_like(slots))
        if not again:
            self._step = (step, self._step[1].to(slots.device) + slots)
        return self._step[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        memo[id(self)] = fresh = Ledger()
        return fresh

    def __reduce__(self):
        return (Ledger, ())


def nothing_owed(module: nn.Module) -> Tensor:
    """0, where the module is."""
    return next(module.parameters(), torch.zeros(())).new_zeros((), dtype=torch.float32)
