"""X-LoRA's router: scalings for every token, layer and expert from the last hidden state of a first, plain pass.

    z = router(h);   p = z, viewed [B, T, L, E] or broadcast over L;   σ = softmax_E(p / temperature), or p
    no top_k: g = σ;   top_k: g = σ on the k largest, 0 elsewhere;   top_k_softmax: softmax over the k selected σ

Buehler & Buehler 2024, arXiv 2402.07148. The gates of a token depend on no later token and on no other row, which
is what makes cached generation exact.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mole.registry import ROUTERS, config_dataclass
from mole.routers.base import Combining, Learning, MixtureShape, Router, dropped
from mole.routers.selection import largest
from mole.routing import Frame, Routing

DTYPES = {"float32": torch.float32, "float64": torch.float64}
BUILT_IN = ("depth", "size", "bias", "relu_and_dropout", "layerwise", "dtype")


@config_dataclass
class XLoraConfig(Combining, Learning):
    """X-LoRA's options under the field names that all routers share."""

    name: Literal["xlora"] = "xlora"
    depth: Annotated[int, Field(ge=1)] = 1
    size: Annotated[int, Field(ge=1)] = 2048
    bias: bool = True
    relu_and_dropout: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    layerwise: bool = False
    softmax: bool = True
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_k_softmax: bool = False
    scaling_pass_value: float = 0.0
    scaling_pass_top_k: bool = True
    global_scaling_weight: float = 1.0
    dtype: Literal["float32", "float64"] = "float32"
    gate_refresh: Annotated[int, Field(ge=1)] = 1
    gate_freeze_after: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self):
        problems = []
        if self.top_k_softmax and self.top_k is None:
            problems.append("router.top_k_softmax=true needs router.top_k")
        if self.top_k_softmax and self.softmax:
            problems.append(
                "router.top_k_softmax=true is the softmax over the experts selected: set router.softmax=false"
            )
        if self.expert_dropout and not self.softmax:
            problems.append(
                "router.expert_dropout gives what an expert left out had to the others, which nothing does without a "
                "softmax over them: set router.softmax=true, or router.expert_dropout=0"
            )
        if problems:
            raise ValueError("\n".join(problems))


def classifier(config: XLoraConfig, hidden_size: int, outputs: int) -> nn.Sequential:
    """depth linear layers H → size → … → outputs, each but the last followed by ReLU and dropout if asked for."""
    layers: list[nn.Module] = []
    width = hidden_size
    for _ in range(config.depth - 1):
        layers.append(nn.Linear(width, config.size, bias=config.bias))
        if config.relu_and_dropout:
            layers += [nn.ReLU(), nn.Dropout(config.dropout)]
        width = config.size
    layers.append(nn.Linear(width, outputs, bias=config.bias))
    return nn.Sequential(*layers).to(DTYPES[config.dtype])


class Predicted(NamedTuple):
    """What the router said last, without graph: σ [B, T, 1|L, E]; gates [B, T, 1|L, K] of the experts `ids`, or all."""

    scalings: Tensor
    gates: Tensor
    ids: Tensor | None


@ROUTERS.register("xlora", XLoraConfig)
class XLoraRouter(Router):
    """Scalings from the routing pass, per token, per layer if `layerwise`. Raises ValueError if top_k > experts.

    Computed in `config.dtype` whatever the backbone's dtype, with autocast off; moving the model to another dtype
    leaves it in its own. Dropout acts in training only, and never inside `generate`.
    """

    needs = frozenset({"hidden_states"})
    learned = True
    config: XLoraConfig

    def __init__(self, config: XLoraConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        outputs = shape.num_experts * (shape.num_sites if config.layerwise else 1)
        self.classifier = classifier(config, shape.hidden_size, outputs)
        self.latest: Predicted | None = None
        # Tensors, so that a compiled model is not compiled again when a setting changes. No buffers: data-parallel
        # training writes to buffers at every forward, and backward would find them changed.
        self._numbers = torch.empty(2, dtype=DTYPES[config.dtype])  # temperature, global weight
        self._constant = torch.empty(1, 1, shape.num_experts)  # gates of pass 1
        self.configure(config)

    def carry(self, old: Router) -> None:
        """Takes over the classifier; of its last layer the rows of the experts (and sites) that both have, by name."""
        assert isinstance(old, XLoraRouter)
        mine, theirs = (list(router.get_submodule("classifier").children())[-1] for router in (self, old))
        fresh = {name: parameter.detach().clone() for name, parameter in mine.named_parameters()}
        super().carry(old)
        experts = [
            (e, old.shape.expert_names.index(n))
            for e, n in enumerate(self.shape.expert_names)
            if n in old.shape.expert_names
        ]
        sites = [(0, 0)]
        if self.config.layerwise:
            sites = [(i, old.shape.sites.index(s)) for i, s in enumerate(self.shape.sites) if s in old.shape.sites]
        with torch.no_grad():
            for name, start in fresh.items():
                source = theirs.get_parameter(name).view(-1, old.shape.num_experts, *start.shape[1:])
                made = start.view(-1, self.shape.num_experts, *start.shape[1:])
                for to_site, site in sites:
                    for to, expert in experts:
                        made[to_site, to] = source[site, expert]
                mine.get_parameter(name).copy_(start)

    def configure(self, config: XLoraConfig) -> None:
        """Other settings from the next forward on. Raises ValueError for what is built in: depth, size, bias …"""
        if config.top_k is not None and config.top_k > self.shape.num_experts:
            raise ValueError(
                f"router.top_k={config.top_k} with {self.shape.num_experts} experts: lower router.top_k or add experts"
            )
        for name in BUILT_IN:
            if getattr(config, name) != getattr(self.config, name):
                raise ValueError(
                    f"router.{name}: {getattr(config, name)!r} cannot replace {getattr(self.config, name)!r} once the "
                    "router is built: build a new mixture"
                )
        self.config = config
        self.gate_refresh, self.gate_freeze_after = config.gate_refresh, config.gate_freeze_after
        for layer in self.classifier:
            if isinstance(layer, nn.Dropout):
                layer.p = config.dropout
        self._numbers.copy_(torch.tensor([config.temperature, config.global_scaling_weight], dtype=torch.float64))
        value, chosen = config.scaling_pass_value, self.shape.num_experts
        self._experts_in_pass_1 = value != 0
        if config.top_k is not None and config.scaling_pass_top_k:
            chosen = config.top_k
            value = 1.0 / chosen if config.top_k_softmax else value
        self._constant.zero_()
        self._constant[..., :chosen] = value * config.global_scaling_weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "XLoraRouter":
        """Follows the model to another device, not to another dtype."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._numbers, self._constant = keep_dtype(self._numbers), keep_dtype(self._constant)
        return super()._apply(keep_dtype, recurse)

    def predictions(self, hidden: Tensor) -> Tensor:
        """`hidden` [B, T, H] → p [B, T, L, E], or [B, T, 1, E] if the layers share it."""
        with torch.autocast(hidden.device.type, enabled=False):
            outputs = self.classifier(hidden.to(self._numbers.device, self._numbers.dtype))
            return outputs.unflatten(-1, (-1, self.shape.num_experts))

    def scalings(self, hidden: Tensor) -> Tensor:
        """`hidden` [B, T, H] → σ in the shape of `predictions`."""
        return self._activated(self.predictions(hidden))

    def _activated(self, predicted: Tensor) -> Tensor:
        with torch.autocast(predicted.device.type, enabled=False):
            return torch.softmax(predicted / self._numbers[0], dim=-1) if self.config.softmax else predicted

    def gates(self, scalings: Tensor) -> tuple[Tensor, Tensor | None]:
        """σ [B, T, 1|L, E] → weights [B, T, 1|L, K] and the experts' ids in the same shape, or None: K is E.

        The weights include the global weight. Ties go to the lower expert; each token is decided by itself.
        """
        if self.config.top_k is None:
            return scalings * self._numbers[1], None
        ids = largest(scalings.detach(), self.config.top_k)
        chosen = scalings.gather(-1, ids)
        if self.config.top_k_softmax:
            chosen = torch.softmax(chosen, dim=-1)
        return chosen * self._numbers[1], ids

    def forward(self, x: Tensor | None, frame: Frame) -> tuple[Routing, ...]:
        """→ L routings [B, T, E or K], one object L times if the layers share it."""
        predicted = self.predictions(frame.need("hidden_states", "xlora"))
        scalings = self._activated(dropped(predicted, self.config.expert_dropout, self.training))
        gates, ids = self.gates(scalings)
        self.latest = Predicted(scalings.detach(), gates.detach(), ids)
        # One unbind: L separate selects would make the backward allocate L full-size zero tensors.
        routings = tuple(
            Routing(weights, chosen, logits=logits, predicted=logged)
            for weights, chosen, logits, logged in zip(
                gates.unbind(2),
                [None] * gates.shape[2] if ids is None else ids.unbind(2),
                (predicted / self._numbers[0]).unbind(2),
                scalings.detach().unbind(2),
                strict=True,
            )
        )
        return routings if self.config.layerwise else routings * self.shape.num_sites

    def routing_pass_weights(self) -> Routing | None:
        """The constant gates of pass 1, `scaling_pass_value` for every expert; None where that is 0.

        With top_k and `scaling_pass_top_k` only the first k experts get it, or 1/k each under `top_k_softmax`.
        """
        return Routing(self._constant) if self._experts_in_pass_1 else None
