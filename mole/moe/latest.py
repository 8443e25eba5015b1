"""What a block's latest forward leaves for those who look: its routing without graph, as matrices, masks and counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mole.routing import Routing


@dataclass(frozen=True)
class Latest:
    """`routing` [B, T, K] without graph, `choices` E' (the null experts last), `valid` bool [B, T] (None: all)."""

    routing: Routing
    choices: int
    valid: Tensor | None
    backend: str

    def by_sample(self) -> Tensor:
        """Gates [B, T, E'], 0 where not chosen."""
        return self.routing.dense(self.choices)

    def chosen(self) -> Tensor:
        """bool [B, T, E']."""
        ids = self.routing.expert_ids
        if ids is None:
            found = torch.ones_like(self.routing.weights, dtype=torch.bool)
            return found if self.valid is None else found & self.valid[..., None]
        marks = torch.zeros(*ids.shape[:-1], self.choices + 1, dtype=torch.bool, device=ids.device)
        return marks.scatter(-1, torch.where(ids >= 0, ids, self.choices), True)[..., :-1]

    def load(self) -> Tensor:
        """int64 [E', T]: how many samples chose each, by position."""
        return self.chosen().sum(0).t()
