"""Bottleneck adapters: a small two-layer network at the end of a sub-layer of each block.

    u(z) = s (U φ(D z + b) + c)          in float32, cast to h's dtype before it is added

h is what the sub-layer computes, x the residual, LN the norm that closes a post-norm sub-layer:

houlsby   LN(h + u(h) + x)          pre-norm h + u(h)       attention and feed-forward (arXiv 1902.00751)
pfeiffer  LN(h + u(LN(h + x)) + x)  pre-norm h + u(h)       feed-forward (arXiv 2005.00247)
parallel  LN(h + u(x) + x)          pre-norm mlp(z) + u(z)  feed-forward (arXiv 2110.04366)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from mole.adapters.adapter import AdapterLayer, Maker, Weights, trainable
from mole.adapters.bottleneck_config import HoulsbyConfig, ParallelConfig, PfeifferConfig
from mole.adapters.bottleneck_sites import chosen_norms, chosen_sites, first_weights, module_of, size_at
from mole.adapters.norm import NormLayer, NormWeights
from mole.adapters.places import width_of
from mole.backbones.joint import Joint
from mole.backbones.modules import device_of, in_out_features, kind_of
from mole.backbones.sites import Site, split_at
from mole.registry import ADAPTERS, unknown

# Of a linear module, or a whole sub-layer: its output, its input. Where a norm closes the sub-layer, at the output
# module or the last linear map that stands for a split site: h, LN(h + x), x.
READS = ("output", "input", "h", "normed", "x")
POST_NORM = READS[2:]


def _known() -> dict[str, Callable[[Tensor], Tensor]]:
    made = {name: ACT2FN[name] for name in ACT2FN if name != "xielu"}  # which has parameters of its own
    return {**made, "identity": made["linear"]}


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = _known()


@dataclass(frozen=True)
class BottleneckWeights(Weights):
    """The two layers at one module.

    `down` D [r, d_in or d_out], `down_bias` b [r], `up` U [d_out, r], `up_bias` c [d_out]; `gain` [1] a learned factor
    of `scale`. `reads` what z is, one of READS. Raises ValueError for tensors that do not fit each other.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    gain: Tensor | None = None
    activation: str = "relu"
    scale: float = 1.0
    reads: str = "output"
    alpha: ClassVar[None] = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        size, made = self.up.shape[-1] if self.up.dim() == 2 else 0, self.up.shape[0] if self.up.dim() else 0
        good = self.down.dim() == 2 and self.down.shape[0] == size > 0 and shapes.get("gain", (1,)) == (1,)
        if not good or shapes["down_bias"] != (size,) or shapes["up_bias"] != (made,):
            raise ValueError(
                f"bottleneck tensors of shapes {shapes}; wanted down [r, d], up [d_out, r] and their biases"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown("activation", self.activation, ACTIVATIONS))
        if self.reads not in READS:
            raise ValueError(unknown("reads", self.reads, READS))

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self.down.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        found = {"down": self.down, "down_bias": self.down_bias, "up": self.up, "up_bias": self.up_bias}
        return found if self.gain is None else {**found, "gain": self.gain}

    def misfit(self, module: nn.Module, model: nn.Module) -> str | None:
        d_in, d_out = widths(module, model)
        post_norm = self.reads in POST_NORM
        closed = is_output(module) or (post_norm and split_at(model, module) is not None)
        if closed != post_norm:
            what = "the output module of a post-norm block" if post_norm else "a module without a norm"
            return f"made for {what}, which a {type(module).__name__} is not"
        made_for = (self.down.shape[1], self.up.shape[0])
        here = (d_in if self.reads == "input" else d_out, d_out)
        if made_for != here:
            return f"made for {made_for[0]} → {made_for[1]} features, the backbone has {here[0]} → {here[1]}"
        return None

    def _layer(self, base: nn.Module, dropout: float, model: nn.Module) -> BottleneckLayer:
        site = split_at(model, base) if self.reads in POST_NORM else None
        return _layer_at(base, self, dropout, site, model)


def is_output(module: nn.Module) -> bool:
    """Whether it is the output module of a post-norm block: LN(dropout(dense(·)) + x)."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in ("dense", "dropout", "LayerNorm"))


def widths(module: nn.Module, model: Any) -> tuple[int, int]:
    """(d_in, d_out) of a linear module; of a whole sub-layer, hidden states both. ValueError for other leaves."""
    if kind_of(module) == "linear":
        return in_out_features(module)
    if kind_of(module) is not None or next(module.children(), None) is None:
        raise ValueError(f"a {type(module).__name__} is neither a linear module nor a sub-layer of a block")
    return width_of(model), width_of(model)


def added(weights: Any, z: Tensor, dropout: nn.Dropout | None = None) -> Tensor:
    """u(z): `z` [..., d] → [..., d_out] in its dtype. `weights` has the fields of `BottleneckWeights`."""
    seen = z.to(torch.promote_types(weights.down.dtype, torch.float32))
    seen = seen if dropout is None else dropout(seen)
    dtype = seen.dtype
    with torch.autocast(z.device.type, enabled=False):
        hidden = ACTIVATIONS[weights.activation](F.linear(seen, weights.down.to(dtype), weights.down_bias.to(dtype)))
        out = weights.scale * F.linear(hidden, weights.up.to(dtype), weights.up_bias.to(dtype))
    return (out if weights.gain is None else out * weights.gain.to(dtype)).to(z.dtype)


class BottleneckLayer(AdapterLayer):
    """A module with a bottleneck after it, or beside it. Only the bottleneck, kept in float32, gets gradients."""

    method = "bottleneck"

    def __init__(self, base: nn.Module, weights: BottleneckWeights, dropout: float = 0.0):
        super().__init__(base, dropout)
        device = device_of(base)
        self.down, self.down_bias = trainable(weights.down, device), trainable(weights.down_bias, device)
        self.up, self.up_bias = trainable(weights.up, device), trainable(weights.up_bias, device)
        self.gain = None if weights.gain is None else trainable(weights.gain, device)
        self.activation, self.scale, self.reads = weights.activation, weights.scale, weights.reads

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`x` [..., d_in] → [..., d_out] in the dtype of the base module's output."""
        out = self.base(x, *args, **kwargs)
        return out + added(self, x if self.reads == "input" else out, self.dropout).to(out.dtype)

    def weights(self) -> BottleneckWeights:
        values = {one.name: getattr(self, one.name) for one in fields(BottleneckWeights)}
        copied: dict[str, Any] = {
            name: value.detach().cpu().clone() if isinstance(value, Tensor) else value for name, value in values.items()
        }
        return BottleneckWeights(**copied)

    def extra_repr(self) -> str:
        return f"size={len(self.down)}, activation={self.activation}, scale={self.scale}, reads={self.reads}"


class OutputLayer(BottleneckLayer):
    """The output module of a post-norm block with a bottleneck before its norm."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:  # type: ignore[override]
        """`hidden_states` [..., d_in] of the sub-layer, `input_tensor` x [..., d] → [..., d]."""
        h = self.base.dropout(self.base.dense(hidden_states))  # type: ignore[operator]
        return _closed(self, self.base.LayerNorm, h, input_tensor, h + input_tensor)


class SplitLayer(BottleneckLayer):
    """The norm that closes a split site with a bottleneck before it. It works once `join` has been called."""

    def __init__(self, base: nn.Module, weights: BottleneckWeights, dropout: float, site: Site):
        super().__init__(base, weights, dropout)
        self.split, self.joint = site, None

    def join(self, model: nn.Module) -> None:
        """From now on what the sub-layer of `model` reads and gives is seen."""
        self.joint = Joint(model, self.split)

    def part(self) -> None:
        """The end of that."""
        if self.joint is not None:
            self.joint.remove()

    def forward(self, total: Tensor) -> Tensor:  # type: ignore[override]
        """`total` h + x [..., d] → the same shape."""
        assert self.joint is not None, "join comes first"
        return _closed(self, self.base, *self.joint.take(), total)


def _closed(layer: Any, norm: Any, h: Tensor, x: Tensor, total: Tensor) -> Tensor:
    """LN(h + x + u(z)) of a layer at a post-norm site; `total` is h + x."""
    return norm(total + added(layer, seen_at(layer.reads, h, x, total, norm), layer.dropout))


def _layer_at(base: nn.Module, weights: Any, dropout: float, site: Site | None, model: nn.Module) -> BottleneckLayer:
    """The layer for a bottleneck at `base`, the last linear map of the split site `site` if one is given."""
    if site is not None and site.norm is not None:
        return SplitLayer(model.get_submodule(site.norm), weights, dropout, site)
    return (OutputLayer if is_output(base) else BottleneckLayer)(base, weights, dropout)


def seen_at(reads: str, h: Tensor, x: Tensor, total: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """z of a bottleneck at a post-norm site: h, x, or the norm of their sum `total`."""
    return {"h": h, "x": x}[reads] if reads != "normed" else norm(total)


@ADAPTERS.register("houlsby", HoulsbyConfig)
@ADAPTERS.register("pfeiffer", PfeifferConfig)
@ADAPTERS.register("parallel", ParallelConfig)
def new_bottleneck(config: Any, model: nn.Module) -> dict[str, Maker]:
    """Bottlenecks at the sites of the placement, and the norms that are trained with them."""
    sites = chosen_sites(config, model)
    modules = dict(model.named_modules())
    made: dict[str, Maker] = {}
    for path, module in modules.items():
        for site in sites:
            if path == module_of(site, config.placement):
                made[path] = partial(_new, module, model, config, size_at(site, config, width_of(model)), site)
    for path in chosen_norms(config, model, sites):
        made[path] = partial(_new_norm, modules[path])
    return made


_CLOSED = {"houlsby": "h", "pfeiffer": "normed", "parallel": "x"}
_OPEN = {"houlsby": "output", "pfeiffer": "output", "parallel": "input"}


def _new(
    base: nn.Module, model: nn.Module, config: Any, size: int, site: Site, generator: torch.Generator
) -> BottleneckLayer:
    d_in, d_out = widths(base, model)
    reads = (_OPEN if site.kind == "linear" else _CLOSED)[config.placement]
    learned = config.scale == "learned"
    weights = BottleneckWeights(
        *first_weights(config, size, d_in if reads == "input" else d_out, d_out, generator),
        gain=torch.ones(1) if learned else None,
        activation=config.activation,
        scale=1.0 if learned else float(config.scale),
        reads=reads,
    )
    return _layer_at(base, weights, config.dropout, site if site.kind == "split" else None, model)


def _new_norm(base: nn.Module, generator: torch.Generator) -> NormLayer:
    return NormLayer(base, NormWeights.of(base))
