"""X-LoRA's router: scalings for every token, layer and expert from the last hidden state of a first, plain pass.

    z = router(h);   p = z, viewed [B, T, L, E] or broadcast over L;   σ = softmax_E(p / temperature), or p
    no top_k: g = σ;   top_k: g = σ on the k largest, 0 elsewhere;   top_k_softmax: softmax over the k selected σ

Buehler & Buehler 2024, arXiv 2402.07148. The gates of a token depend on no later token and on no other row, which
is what makes cached generation exact.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mole.registry import ROUTERS, config_dataclass
from mole.routers.base import MixtureShape, Router
from mole.routers.top_k import largest
from mole.routing import Frame, Routing

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@config_dataclass
class XLoraConfig:
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
    global_scaling_weight: float = 1.0
    dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self):
        problems = []
        if self.top_k_softmax and self.top_k is None:
            problems.append("router.top_k_softmax=true needs router.top_k")
        if self.top_k_softmax and self.softmax:
            problems.append(
                "router.top_k_softmax=true is the softmax over the experts selected: set router.softmax=false"
            )
        if problems:
            raise ValueError("; ".join(problems))


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


@ROUTERS.register("xlora", XLoraConfig)
class XLoraRouter(Router):
    """Scalings from the routing pass, per token, per layer if `layerwise`. Raises ValueError if top_k > experts.

    Computed in `config.dtype` whatever the backbone's dtype, with autocast off. Dropout acts in training only, and
    never inside `generate`.
    """

    needs = frozenset({"hidden_states"})
    learned = True

    def __init__(self, config: XLoraConfig, shape: MixtureShape, *, input_dim: int | None = None):
        super().__init__(config, shape, input_dim=input_dim)
        if config.top_k is not None and config.top_k > shape.num_experts:
            raise ValueError(
                f"router.top_k={config.top_k} with {shape.num_experts} experts: lower router.top_k or add experts"
            )
        outputs = shape.num_experts * (shape.num_sites if config.layerwise else 1)
        self.classifier = classifier(config, shape.hidden_size, outputs)

    def scalings(self, hidden: Tensor) -> Tensor:
        """`hidden` [B, T, H] → σ [B, T, L, E], or [B, T, 1, E] if the layers share it."""
        with torch.autocast(hidden.device.type, enabled=False):
            outputs = self.classifier(hidden.to(DTYPES[self.config.dtype]))
            predicted = outputs.unflatten(-1, (-1, self.shape.num_experts))
            return torch.softmax(predicted / self.config.temperature, dim=-1) if self.config.softmax else predicted

    def forward(self, x: Tensor | None, frame: Frame) -> tuple[Routing, ...]:
        """→ L routings [B, T, E or K], one object L times if the layers share it."""
        scalings = self.scalings(frame.need("hidden_states", "xlora"))
        ids = None
        gates = scalings
        if self.config.top_k is not None:
            ids = largest(scalings.detach(), self.config.top_k)
            gates = scalings.gather(-1, ids)
            if self.config.top_k_softmax:
                gates = torch.softmax(gates, dim=-1)
        gates = gates * self.config.global_scaling_weight
        # One unbind: L separate selects would make the backward allocate L full-size zero tensors.
        parts = [gates.unbind(2), scalings.detach().unbind(2), ids.unbind(2) if ids is not None else None]
        routings = tuple(
            Routing(parts[0][site], parts[2][site] if parts[2] else None, predicted=parts[1][site])
            for site in range(gates.shape[2])
        )
        return routings if self.config.layerwise else routings * self.shape.num_sites

    def routing_pass_weights(self) -> Routing | None:
        """The constant gates of pass 1: `scaling_pass_value` for every expert, of the first k only with top_k."""
        value, experts = self.config.scaling_pass_value, self.shape.num_experts
        if value == 0:
            return None
        chosen = experts if self.config.top_k is None else self.config.top_k
        if self.config.top_k_softmax:
            value = 1.0 / chosen
        weights = torch.zeros(1, 1, experts, device=next(self.parameters()).device)
        weights[..., :chosen] = value * self.config.global_scaling_weight
        return Routing(weights)
