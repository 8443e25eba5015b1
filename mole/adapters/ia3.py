"""IA3: one factor per feature of a linear module's output, or of its input (Liu et al., 2022, arXiv 2205.05638).

y = l ∘ (W x + b);   where the feed-forward reads its hidden layer, y = W (l ∘ x) + b
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mole.adapters.adapter import AdapterLayer, Maker, Weights, trainable
from mole.adapters.places import attentions, outputs_of_blocks
from mole.backbones.modules import device_of, find_modules, in_out_features, kind_of
from mole.registry import ADAPTERS, config_dataclass


@config_dataclass
class Ia3Config:
    """Which modules get factors: `targets` of their outputs, `feedforward` of their inputs.

    Targets that are auto: keys and values of every attention, and the last linear module of every feed-forward.
    """

    name: Literal["ia3"] = "ia3"
    targets: tuple[str, ...] | Literal["auto"] = "auto"
    feedforward: tuple[str, ...] | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.targets != "auto" and self.feedforward != "auto" and not (*self.targets, *self.feedforward):
            raise ValueError("targets, feedforward: name at least one module in one of them, or auto")


@dataclass(frozen=True)
class Ia3Weights(Weights):
    """`factors` l, [d_out], or [d_in] with `feedforward`: then they multiply what the module reads."""

    factors: Tensor
    feedforward: bool = False

    def __post_init__(self) -> None:
        if self.factors.dim() != 1 or not len(self.factors):
            raise ValueError(f"IA3 factors of shape {tuple(self.factors.shape)}; wanted one per feature")

    def tensors(self) -> dict[str, Tensor]:
        return {"factors": self.factors}

    def misfit(self, module: nn.Module, model: nn.Module) -> str | None:
        if kind_of(module) != "linear":
            return f"a {type(module).__name__} is not a linear module, and IA3 multiplies features of one"
        width = in_out_features(module)[0 if self.feedforward else 1]
        if width != len(self.factors):
            side = "input" if self.feedforward else "output"
            return f"{len(self.factors)} factors for {width} features of the module's {side}"
        return None

    def _layer(self, base: nn.Module, dropout: float, model: nn.Module) -> Ia3Layer:
        return Ia3Layer(base, self)


class Ia3Layer(AdapterLayer):
    """A linear module with one factor per feature. Only the factors, kept in float32, get gradients."""

    method = "ia3"

    def __init__(self, base: nn.Module, weights: Ia3Weights):
        super().__init__(base)
        self.factors = trainable(weights.factors, device_of(base))
        self.feedforward = weights.feedforward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` [..., d_in] → [..., d_out] in the dtype of the base module's output."""
        if self.feedforward:
            return self.base((x * self.factors).to(x.dtype), *args, **kwargs)
        out = self.base(x, *args, **kwargs)
        return (out * self.factors).to(out.dtype)

    def weights(self) -> Ia3Weights:
        return Ia3Weights(self.factors.detach().cpu().clone(), self.feedforward)

    def extra_repr(self) -> str:
        return f"features={len(self.factors)}, feedforward={self.feedforward}"


@ADAPTERS.register("ia3", Ia3Config)
def new_ia3(config: Ia3Config, model: nn.Module) -> dict[str, Maker]:
    """IA3 layers that do not change their modules' outputs yet: every factor is 1."""

    def make(base: nn.Module, feedforward: bool, generator: torch.Generator) -> Ia3Layer:
        width = in_out_features(base)[0 if feedforward else 1]
        return Ia3Layer(base, Ia3Weights(torch.ones(width), feedforward))

    outputs = _keys_and_values(model) if config.targets == "auto" else _found(model, config.targets)
    inputs = outputs_of_blocks(model)[1] if config.feedforward == "auto" else _found(model, config.feedforward)
    if both := set(outputs) & set(inputs):
        raise ValueError(f"adapter.feedforward: {min(both)} is among adapter.targets too: name it in one of them")
    order = [path for path, _ in model.named_modules() if path in outputs or path in inputs]
    return {path: partial(make, {**outputs, **inputs}[path], path in inputs) for path in order}


def _found(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    return find_modules(model, targets) if targets else {}


def _keys_and_values(model: nn.Module) -> dict[str, nn.Module]:
    """The projections to keys and values, by their usual names. Raises ValueError where they are called otherwise."""
    found = {}
    for path, attention in attentions(model).items():
        for name, module in attention.named_modules():
            last = name.rsplit(".", 1)[-1]
            if kind_of(module) == "linear" and any(fnmatchcase(last, known) for known in _KEYS_AND_VALUES):
                found[f"{path}.{name}"] = module
    if not found:
        raise ValueError(
            f"adapter.targets=auto finds no projection called {', '.join(_KEYS_AND_VALUES)} in the attention: name the "
            "modules in adapter.targets"
        )
    return found


_KEYS_AND_VALUES = (
    "k_proj",
    "v_proj",
    "key",
    "value",
    "k_lin",
    "v_lin",
    "k",
    "v",
    "c_attn",
    "query_key_value",
    "qkv_proj",
)
