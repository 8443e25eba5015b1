"""Prompt tuning: virtual tokens before the text, of which the embeddings are trained (Lester et al., 2021, 2104.08691).

They are put in front of the embeddings that the inner model reads, and cut off again from what it gives: to everything
outside, labels and logits are those of the text. A KV cache holds them in front of the text, from the first forward on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mole.adapters.adapter import AdapterLayer, Maker, Weights, trainable
from mole.adapters.places import PROMPT, check_decoder, inner_model, width_of
from mole.adapters.prompted import prompted
from mole.registry import ADAPTERS, config_dataclass


@config_dataclass
class PromptConfig:
    """What a new prompt looks like: embeddings of random words of the vocabulary, or random numbers."""

    name: Literal["prompt"] = "prompt"
    tokens: int = Field(default=16, ge=1, le=4096)
    init: Literal["vocabulary", "normal"] = "vocabulary"
    init_std: float = Field(default=0.02, ge=0)


@dataclass(frozen=True)
class PromptWeights(Weights):
    """`embeddings` [m, d] of the virtual tokens. Raises ValueError for another shape."""

    embeddings: Tensor

    def __post_init__(self) -> None:
        if self.embeddings.dim() != 2 or not self.embeddings.numel():
            raise ValueError(f"a prompt of shape {tuple(self.embeddings.shape)}; wanted [m, d]")

    @property
    def symbol(self) -> str:
        return PROMPT

    def tensors(self) -> dict[str, Tensor]:
        return {"embeddings": self.embeddings}

    def misfit(self, module: nn.Module, model: nn.Module) -> str | None:
        try:
            check_model(module, model)
        except ValueError as error:
            return str(error)
        if self.embeddings.shape[1] != input_width(model):
            return f"embeddings of {self.embeddings.shape[1]} features, the backbone has {input_width(model)}"
        return None

    def _layer(self, base: nn.Module, dropout: float, model: nn.Module) -> PromptLayer:
        return PromptLayer(base, self)


def check_model(inner: nn.Module, model: Any) -> None:
    """Raises ValueError for a model that nothing can be put before."""
    check_decoder(model, "prompts")
    if inner_model(model)[1] is not inner:
        raise ValueError(f"a prompt belongs before the whole inner model, {inner_model(model)[0]}")


def input_width(model: Any) -> int:
    """Features of the embeddings of tokens."""
    table = model.get_input_embeddings()
    return getattr(table, "embedding_dim", None) or width_of(model)


class PromptLayer(AdapterLayer):
    """An inner model with a prompt. Only the embeddings, kept in float32, get gradients."""

    method = "prompt"

    def __init__(self, base: nn.Module, weights: PromptWeights):
        super().__init__(base)
        device = next(base.parameters()).device
        self.embeddings = trainable(weights.embeddings, device)

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """As the inner model, for the positions of the text."""
        return prompted(self.base, self.embeddings[None], None, input_ids=input_ids, **kwargs)

    def weights(self) -> PromptWeights:
        return PromptWeights(self.embeddings.detach().cpu().clone())

    def extra_repr(self) -> str:
        return "tokens={}, features={}".format(*self.embeddings.shape)


@ADAPTERS.register("prompt", PromptConfig)
def new_prompt(config: PromptConfig, model: nn.Module) -> dict[str, Maker]:
    """A prompt before the inner model. It changes outputs from the start."""
    check_decoder(model, "prompts")
    path, inner = inner_model(model)

    def make(base: nn.Module, generator: torch.Generator) -> PromptLayer:
        table = model.get_input_embeddings().weight.detach()  # type: ignore[operator,union-attr]
        if config.init == "vocabulary":
            words = torch.randint(len(table), (config.tokens,), generator=generator)
            first = table[words.to(table.device)].float()
        else:
            first = torch.randn(config.tokens, table.shape[1], generator=generator) * config.init_std
        return PromptLayer(base, PromptWeights(first))

    return {path: partial(make, inner)}
