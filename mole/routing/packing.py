"""Packed rows: several samples one after another in a row, and what routers see of them, which is each alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mole.routing.routing import Routing


class Packing:
    """Where S samples lie in B rows of T positions.

    `segment_ids` int64 [B, T]: the number of the sample that a position belongs to, -1 at padding. Every sample is one
    unbroken stretch, and the numbers are 0 … S - 1. L is the length of the longest. Raises ValueError for others.
    """

    def __init__(self, segment_ids: Tensor):
        if segment_ids.dim() != 2 or segment_ids.dtype != torch.int64:
            raise ValueError(
                f"segment_ids are int64 [B, T], got {segment_ids.dtype} of shape {tuple(segment_ids.shape)}"
            )
        starts = torch.ones_like(segment_ids, dtype=torch.bool)
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        rows, columns = torch.nonzero(starts & (segment_ids >= 0), as_tuple=True)
        numbers = segment_ids[rows, columns]
        count = len(numbers)
        if not count or not torch.equal(numbers.sort().values, torch.arange(count, device=numbers.device)):
            raise ValueError(
                "segment_ids number the samples from 0, each one unbroken stretch of one row, -1 at padding"
            )
        self.segment_ids = segment_ids
        order = numbers.argsort()
        self._rows, self._starts = rows[order], columns[order]
        places = torch.arange(segment_ids.shape[1], device=segment_ids.device)
        begun = torch.where(starts, places, 0).cummax(dim=1).values  # padding counts from its own beginning
        self.position_ids = places - begun
        lengths = torch.bincount(segment_ids[segment_ids >= 0], minlength=count)
        steps = torch.arange(int(lengths.max()), device=segment_ids.device)
        self.mask = steps < lengths[:, None]
        self._columns = torch.minimum(self._starts[:, None] + steps, (self._starts + lengths - 1)[:, None])

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self._rows)

    def apart(self, tensor: Tensor) -> Tensor:
        """[B, T, …] → [S, L, …]; behind its end a sample goes on with its last position.

        Raises ValueError for a tensor of other rows or positions.
        """
        if tensor.shape[:2] != self.segment_ids.shape:
            raise ValueError(
                f"packed rows are {list(self.segment_ids.shape)}, and a router reads {list(tensor.shape)}: train this "
                "mixture without training.packing"
            )
        rows, columns = self._rows.to(tensor.device), self._columns.to(tensor.device)
        return tensor[rows[:, None], columns]

    def together(self, routing: Routing) -> Routing:
        """The routing [1|S, 1|L, …] of the samples → [B, T, …] of the rows, which has the former as `apart`."""
        if routing.is_static:
            return routing

        def spread(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            ids, places = self.segment_ids.clamp_min(0).to(tensor.device), self.position_ids.to(tensor.device)
            places = places.clamp_max(tensor.shape[1] - 1)  # padding may be longer than any sample
            return tensor[ids if tensor.shape[0] > 1 else ids.new_zeros(()), places]

        weights = spread(routing.weights)
        assert weights is not None
        return Routing(
            weights, spread(routing.expert_ids), spread=spread(routing.spread), base=spread(routing.base), apart=routing
        )

    def marked(self, routing: Routing) -> Routing:
        """A routing that was made for the rows, [1|B, 1|T, …], with that of the samples as its `apart`."""
        if routing.is_static:
            return routing

        def taken(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else self.apart(tensor.expand(*self.segment_ids.shape, *tensor.shape[2:]))

        weights = taken(routing.weights)
        assert weights is not None
        alone = replace(
            routing,
            weights=weights,
            expert_ids=taken(routing.expert_ids),
            logits=taken(routing.logits),
            predicted=taken(routing.predicted),
            chances=taken(routing.chances),
            angles=taken(routing.angles),
            spread=taken(routing.spread),
            base=taken(routing.base),
        )
        return replace(routing, apart=alone)
