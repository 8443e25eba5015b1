"""Routing: which experts work on which token and how much, as plain data between routers and mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

EMPTY = -1  # expert id of a slot that nobody fills; its weight is 0


@dataclass(frozen=True)
class Routing:
    """Weights of experts, shared (leading 1), per example or per token.

    `weights`    float32 [1|B, 1|T, K]; or [1|B, 1|T, Q, K], weights of their own for each of Q blocks of the features,
                 which only combine=parameters can spend.
    `expert_ids` int64, broadcastable to `weights`; None: K is the number of experts, in the mixture's order.
                 An id may repeat (repeats add up); -1 is an empty slot with weight 0. Ids from E on are null experts:
                 nobody works for their weight.
    `logits`     [1|B, 1|T, (Q,) E] before top-k, with graph; for losses and statistics, never read by a mixture.
    `predicted`  [1|B, 1|T, (Q,) E] what the routing log keeps where that is not `dense()` (X-LoRA logs its scalings
                 before top-k and before the global weight).
    `chances`    [1|B, 1|T, E] each expert's probability of being chosen under another draw of the noise, with graph.
    `angles`     [1|B, 1|T, E] cosines of the tokens with the experts' prototypes, without graph, for statistics.
    `base`       [1|B, 1|T, 1] the weight of the plain backbone beside the experts; None: what their weights leave of 1.
    `spread`     [1|B, 1|T, E] what `dense()` gives, where somebody made it already for many routings at once.
    `apart`      where rows hold several samples, the routing of each alone: what is recorded (see packing.py).
    """

    weights: Tensor
    expert_ids: Tensor | None = None
    logits: Tensor | None = None
    predicted: Tensor | None = None
    chances: Tensor | None = None
    angles: Tensor | None = None
    spread: Tensor | None = None
    base: Tensor | None = None
    apart: Routing | None = None

    def __post_init__(self):
        rank = self.weights.dim()
        if rank not in (3, 4):
            raise ValueError(f"routing weights must be [1|B, 1|T, (Q,) K], got shape {tuple(self.weights.shape)}")
        if self.expert_ids is not None and self.expert_ids.dim() != rank:
            raise ValueError(f"expert_ids must have the rank of the weights, got {tuple(self.expert_ids.shape)}")

    @property
    def num_blocks(self) -> int:
        """Q, the blocks of features that have weights of their own."""
        return self.weights.shape[2] if self.weights.dim() == 4 else 1

    @property
    def is_static(self) -> bool:
        """The same weights for every token of every example."""
        return self.weights.shape[0] == 1 and self.weights.shape[1] == 1

    @property
    def is_per_example(self) -> bool:
        """One set of weights for all tokens of an example."""
        return self.weights.shape[1] == 1

    def dense(self, num_experts: int) -> Tensor:
        """The weights over all experts, [1|B, 1|T, (Q,) E]; repeated ids are added."""
        if self.expert_ids is None:
            return self.weights
        if self.spread is not None:
            return self.spread
        ids = self.expert_ids.expand_as(self.weights)
        known = (ids >= 0) & (ids < num_experts)
        filled = torch.where(known, self.weights, torch.zeros_like(self.weights))
        empty = self.weights.new_zeros(*self.weights.shape[:-1], num_experts)
        return empty.scatter_add(-1, ids.clamp(0, num_experts - 1), filled)

    def logged(self, num_experts: int) -> Tensor:
        """What the routing log keeps, [1|B, 1|T, E]; the mean of the blocks where there are some."""
        found = self.dense(num_experts) if self.predicted is None else self.predicted
        return found.mean(2) if found.dim() == 4 else found

    def for_experts(self, names: Sequence[str], known: Sequence[str]) -> Routing:
        """This routing over the experts `known`, for a mixture of `names`: what the others had is lost, new ones get 0.

        Raises ValueError if the weights are not of as many experts as are known.
        """
        weights = self.dense(len(known))
        if weights.shape[-1] != len(known):
            raise ValueError(f"a routing of {weights.shape[-1]} experts, and {len(known)} names of them: {known}")
        with_none = torch.cat([weights, weights.new_zeros(*weights.shape[:-1], 1)], dim=-1)
        places = {name: place for place, name in enumerate(known)}
        return Routing(with_none[..., [places.get(name, -1) for name in names]], base=self.base)

    def for_rows(self, batch_size: int) -> Routing:
        """This routing for a batch of `batch_size` rows: beams and return sequences are copies of one example.

        Raises ValueError if the batch is no multiple of the examples that the routing was made for.
        """
        rows = self.weights.shape[0]
        if rows == 1 or rows == batch_size:  # not `in`: a trace finds no symbolic length in a tuple
            return self
        if batch_size % rows:
            raise ValueError(f"a routing for {rows} examples cannot serve a batch of {batch_size} rows")

        def repeat(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.shape[0] == 1:
                return tensor
            return tensor.repeat_interleave(batch_size // rows, dim=0)

        return replace(
            self,
            weights=self.weights.repeat_interleave(batch_size // rows, dim=0),
            expert_ids=repeat(self.expert_ids),
            logits=repeat(self.logits),
            predicted=repeat(self.predicted),
            spread=repeat(self.spread),
            base=repeat(self.base),
        )

    def detach(self) -> Routing:
        """The same routing without graph."""
        return replace(
            self,
            weights=self.weights.detach(),
            logits=None if self.logits is None else self.logits.detach(),
            predicted=None if self.predicted is None else self.predicted.detach(),
            chances=None if self.chances is None else self.chances.detach(),
            spread=None if self.spread is None else self.spread.detach(),
            base=None if self.base is None else self.base.detach(),
        )
