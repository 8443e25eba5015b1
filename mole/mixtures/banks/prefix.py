"""Prefix experts at one attention: every query sees its own keys and those of all prefixes.

The products with the keys of expert e get ln w_e added, so that one softmax over all of them weighs the experts: with
one-hot weights that expert alone, with w_e = 0 none of it, and copies of one expert with Σ w = 1 are that expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mole.adapters import PrefixWeights
from mole.adapters.prefix_attention import AttentionFacts, attend
from mole.kernels import columns_of
from mole.mixtures.banks.calls import CallBank
from mole.routing import Routing


class PrefixBank(CallBank):
    """Each expert with its own length m_e; `facts` of the attention."""

    kind = "prefix"

    def __init__(
        self,
        experts: Mapping[int, PrefixWeights],
        num_experts: int,
        *,
        facts: AttentionFacts,
        dtype: torch.dtype,
    ):
        super().__init__(experts, num_experts)
        members = [experts[e] for e in self.present]
        (self.block,) = {member.block for member in members}
        self.lengths = tuple(len(member.keys) for member in members)
        self.keys = nn.Parameter(torch.cat([m.keys.detach().to(dtype) for m in members]), requires_grad=False)
        self.values = nn.Parameter(torch.cat([m.values.detach().to(dtype) for m in members]), requires_grad=False)
        self.facts = facts

    def call(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> Any:
        """The attention for these arguments. Raises ValueError for negative weights: they have no logarithm."""
        weights = self.local_weights(routing)
        _check_sign(weights)
        tiny = torch.finfo(weights.dtype).tiny
        least = torch.finfo(weights.dtype).min / 4  # below every product, and no addition takes it to infinity
        logs = torch.where(weights > 0, weights.clamp_min(tiny).log(), least)
        bias = logs.index_select(-1, columns_of(self.lengths, logs.device))[:, None]  # [1|B, 1, 1|T, Σ m]
        keys = self.facts.turned(self.keys, self.lengths)
        prefix = (part.transpose(0, 1)[None] for part in (keys, self.values))
        return attend(base, self.facts, args, kwargs, *prefix, bias=bias)

    def weights(self, expert: int) -> PrefixWeights | None:  # type: ignore[override]
        """The prefix of the expert with that mixture index, as views of the bank; None if it has none here."""
        if expert not in self.present:
            return None
        place = self.present.index(expert)
        start = sum(self.lengths[:place])
        part = slice(start, start + self.lengths[place])
        return PrefixWeights(self.keys.detach()[part], self.values.detach()[part], self.block)


def _check_sign(weights: Tensor) -> None:
    """On the CPU at once; on a device, and in a compiled graph, by an assertion that nobody waits for."""
    if weights.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async((weights >= 0).all(), "prefix experts take no negative weights")  # pyright: ignore
    elif bool((weights < 0).any()):
        raise ValueError("prefix experts take no negative weights: they would have no place in the attention's softmax")
