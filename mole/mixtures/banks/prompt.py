"""Prompt experts before the inner model: each example reads the virtual tokens of its expert, or an average of them.

Prompts of one length are averaged with the example's weights: with one-hot weights that is the one expert. Of prompts
of unlike lengths an example can have one, whole; shorter ones stand at the end, and the places before are masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mole.adapters import PromptWeights
from mole.adapters.prompted import prompted
from mole.mixtures.banks.calls import CallBank
from mole.routing import Routing


class PromptBank(CallBank):
    """Each expert with its own number of virtual tokens m_e."""

    kind = "prompt"
    takes = "sequence"

    def __init__(self, experts: Mapping[int, PromptWeights], num_experts: int, *, dtype: torch.dtype):
        super().__init__(experts, num_experts)
        members = [experts[e] for e in self.present]
        self.lengths = tuple(len(member.embeddings) for member in members)
        rows = [member.embeddings.detach().to(dtype) for member in members]
        self.embeddings = nn.Parameter(torch.cat(rows), requires_grad=False)

    def call(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> Any:
        """The inner model for these arguments.

        Raises ValueError for weights that differ from token to token, and, where lengths are unlike, for weights that
        are not one-hot.
        """
        if routing.weights.shape[1] != 1:
            raise ValueError(
                "prompt experts act on whole sequences, and this routing has weights for every token; use a router of "
                "scope model (task, predictor …) or prefix experts"
            )
        if len(args) > 1:
            raise ValueError(f"the inner model got {len(args)} arguments by place: prompts need them by name")
        prompts, there = self._prompts(self.local_weights(routing)[:, 0])
        inputs = {"input_ids": args[0], **kwargs} if args else kwargs
        return prompted(base, prompts, there, **inputs)

    def _prompts(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [1|B, n] → virtual tokens [1|B, m, d] and which of them are there, bool [1|B, m]."""
        parts = self.embeddings.split(self.lengths)
        size, used = max(self.lengths), weights != 0
        if min(self.lengths) < size:
            _check_one_hot(weights)
        padded = torch.stack([torch.nn.functional.pad(part, (0, 0, size - len(part), 0)) for part in parts])
        places = torch.arange(size, device=weights.device)
        lengths = torch.tensor(self.lengths, device=weights.device)
        has = places[None] >= size - lengths[:, None]  # [n, m]
        there = (used[..., None] & has).any(1)
        return torch.einsum("bn,nmd->bmd", weights.to(padded.dtype), padded), there

    def weights(self, expert: int) -> PromptWeights | None:  # type: ignore[override]
        """The prompt of the expert with that mixture index, as a view of the bank; None if it has none here."""
        if expert not in self.present:
            return None
        return PromptWeights(self.embeddings.detach().split(self.lengths)[self.present.index(expert)])


def _check_one_hot(weights: Tensor) -> None:
    """Raises ValueError unless each row is one-hot, or nothing."""
    good = ((weights == 0) | (weights == 1)).all() & (weights.sum(-1) <= 1).all()
    reason = (
        "prompts of unlike lengths have no average: each example needs one expert with weight 1 (router=task, single, "
        "predictor with top_k=1), or prompts of one length"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(good, reason)  # pyright: ignore
    elif not bool(good):
        raise ValueError(reason)
