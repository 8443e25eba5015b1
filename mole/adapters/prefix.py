"""Prefix tuning: keys and values that every token of a sequence sees first (Li & Liang, 2021, arXiv 2101.00190).

They stand in front of the keys and values of each attention, without a rotation of their own, m of them. As in PEFT's
format tokens count from m on; here they count from 0, and a prefix key is turned back by m positions instead, which
gives every product of query and key the same value. So prefixes of any length go together, a prefix leaves the KV cache
as it is, and it works with any way of generating.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mole.adapters.adapter import AdapterLayer, Maker, Weights, trainable
from mole.adapters.places import attentions, check_decoder, prefix_symbol
from mole.adapters.prefix_attention import AttentionFacts, attend, facts_of
from mole.backbones.modules import device_of
from mole.registry import ADAPTERS, config_dataclass


@config_dataclass
class PrefixConfig:
    """What a new prefix looks like: the same number of keys and values in every attention."""

    name: Literal["prefix"] = "prefix"
    tokens: int = Field(default=16, ge=1, le=4096)
    init_std: float = Field(default=0.02, ge=0)


@dataclass(frozen=True)
class PrefixWeights(Weights):
    """`keys` and `values` [m, heads, d_head] of the attention of block `block`, for tokens that count from m on.

    Raises ValueError for tensors that do not fit each other.
    """

    keys: Tensor
    values: Tensor
    block: int = 0

    def __post_init__(self) -> None:
        if self.keys.dim() != 3 or self.keys.shape != self.values.shape or not self.keys.numel():
            shapes = tuple(self.keys.shape), tuple(self.values.shape)
            raise ValueError(f"a prefix of shapes {shapes[0]} and {shapes[1]}; wanted [m, heads, d_head] twice")

    @property
    def symbol(self) -> str:
        return prefix_symbol(self.block)

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "values": self.values}

    def misfit(self, module: nn.Module, model: nn.Module) -> str | None:
        try:
            facts = facts_of(module, model)
        except ValueError as error:
            return str(error)
        if tuple(self.keys.shape[1:]) != (facts.heads, facts.head_dim):
            made = "{} heads of {} features".format(*self.keys.shape[1:])
            return f"made for {made}, the backbone has {facts.heads} of {facts.head_dim}"
        return None

    def _layer(self, base: nn.Module, dropout: float, model: nn.Module) -> PrefixLayer:
        return PrefixLayer(base, self, facts_of(base, model))


class PrefixLayer(AdapterLayer):
    """An attention with a prefix. Only keys and values of the prefix, kept in float32, get gradients."""

    method = "prefix"

    def __init__(self, base: nn.Module, weights: PrefixWeights, facts: AttentionFacts):
        super().__init__(base)
        device = device_of(base)
        self.keys, self.values = trainable(weights.keys, device), trainable(weights.values, device)
        self.block = weights.block
        self.facts = facts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention, which every query sees the prefix in."""
        keys = self.facts.turned(self.keys, [len(self.keys)])
        prefix = (part.transpose(0, 1)[None] for part in (keys, self.values))  # [1, heads, m, d_head]
        return attend(self.base, self.facts, args, kwargs, *prefix)

    def weights(self) -> PrefixWeights:
        keys, values = (part.detach().cpu().clone() for part in (self.keys, self.values))
        return PrefixWeights(keys, values, self.block)

    def extra_repr(self) -> str:
        return "tokens={}, heads={}, head_dim={}".format(*self.keys.shape)


@ADAPTERS.register("prefix", PrefixConfig)
def new_prefix(config: PrefixConfig, model: nn.Module) -> dict[str, Maker]:
    """A prefix in every attention, normal with `init_std`. It changes outputs from the start: attention is shared."""

    check_decoder(model, "prefixes")

    def make(block: int, base: nn.Module, generator: torch.Generator) -> PrefixLayer:
        facts = facts_of(base, model)
        shape = (config.tokens, facts.heads, facts.head_dim)
        keys, values = (torch.randn(shape, generator=generator) * config.init_std for _ in range(2))
        return PrefixLayer(base, PrefixWeights(keys, values, block), facts)

    return {path: partial(make, block, base) for block, (path, base) in enumerate(attentions(model).items())}
