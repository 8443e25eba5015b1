"""Attention router (AdapterFusion): each token asks which expert's output it wants, and the mix is mapped once more.

    q = W_q h_t + b_q;   a = softmax_e(q · W_k u_e / τ);   y = f + W_v Σ_e a_e u_e

u_e what expert e adds, h the module's own output f (or its input). Pfeiffer et al. 2021, arXiv 2005.00247.

u_e is never made for all experts: q · W_k u_e = ⟨W_kᵀ q, u_e⟩, which the bank computes in the width of its ranks; a
bias of the keys would be the same for all experts. W_v acts on the sum.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mole.registry import ROUTERS, config_dataclass
from mole.routers.base import Combining, Learning, MixtureShape, Router, dropped
from mole.routers.float32 import Linear, at_least_float32, without_autocast
from mole.routing import Frame, Routing


@config_dataclass
class AttentionConfig(Combining, Learning):
    """What asks, whether the mix is mapped, and what holds that map near the identity."""

    name: Literal["attention"] = "attention"
    query: Literal["input", "output"] = "output"
    value: bool = True
    value_reg: Annotated[float, Field(ge=0)] = 0.01
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    init_std: Annotated[float, Field(ge=0)] = 0.02
    missing: Literal["drop", "renormalise"] = "renormalise"

    def __post_init__(self):
        if self.combine != "outputs":
            raise ValueError("router=attention weighs what experts give: set router.combine=outputs")


@config_dataclass
class AdapterFusionConfig(AttentionConfig):
    """AdapterFusion over bottlenecks: attention at every site. `norms` of experts that trained some: refuse, or base.

    The mix goes through the backbone's norm: an expert's own norm would count for nothing. `from_folder` a fusion that
    AdapterHub trained over the same experts, which the routers start from.
    """

    name: Literal["adapter_fusion"] = "adapter_fusion"  # type: ignore[assignment]
    norms: Literal["refuse", "base"] = "refuse"
    from_folder: str | None = None


@ROUTERS.register("adapter_fusion", AdapterFusionConfig)
@ROUTERS.register("attention", AttentionConfig)
class AttentionRouter(Router):
    """Attention of every token over the experts at its module; one instance per module.

    In training `value_reg` · ‖I − W_v‖²_F joins the loss of the same step.
    """

    scope = "layer"
    learned = True
    needs = frozenset({"outputs"})
    config: AttentionConfig

    def __init__(self, config: AttentionConfig, shape: MixtureShape, *, output_dim: int | None = None, **place: Any):
        super().__init__(config, shape, **place)
        assert self.input_dim is not None, "built with the widths of its module"
        assert output_dim is not None, "built with the widths of its module"
        asking = output_dim if config.query == "output" else self.input_dim
        self.queries = Linear(asking, output_dim)
        self.keys = nn.Parameter(torch.empty(output_dim, output_dim))
        nn.init.normal_(self.queries.weight, std=config.init_std)
        nn.init.zeros_(self.queries.bias)
        nn.init.normal_(self.keys, std=config.init_std)
        if config.value:
            self.values = nn.Parameter(torch.eye(output_dim))

    def forward(  # type: ignore[override]
        self, x: Tensor, frame: Frame, *, outputs: Tensor, inner: Callable[[Tensor], Tensor], present: Sequence[int]
    ) -> Routing:
        """`x` [B, T, d_in], `outputs` [B, T, d_out] of the module → weights [B, T, E].

        `inner` takes directions [B, T, d_out] to ⟨what expert e adds, direction⟩, [B, T, E]; `present` are the experts
        that add something here. The others are not attended to, or with missing=drop score 0.
        """
        config = self.config
        with without_autocast(x):
            asked = self.queries(outputs if config.query == "output" else x)
            logits = at_least_float32(inner(asked @ at_least_float32(self.keys).to(asked.dtype))) / config.temperature
            some = config.missing == "renormalise" and len(present) < self.shape.num_experts
            here = torch.tensor(present, device=logits.device) if some else None
            asking = logits if here is None else logits.index_select(-1, here)
            asking = dropped(asking, config.expert_dropout, self.training)
            weights = F.dropout(torch.softmax(asking, dim=-1), config.dropout, self.training)
            if here is not None:
                weights = torch.zeros_like(logits).index_copy(-1, here, weights)
            if self.training and config.value and config.value_reg:
                frame.penalise("value_reg", self.sites[0], config.value_reg * self._change().square().sum())
        return Routing(weights, logits=logits)

    def value(self, mixed: Tensor) -> Tensor:
        """W_v on the mix of the experts, [.., d_out] → the same shape and dtype."""
        if not self.config.value:
            return mixed
        # As a change of the mix: in a coarse dtype, the identity would swallow the small steps of training.
        with without_autocast(mixed):
            return mixed + F.linear(mixed, self._change().to(mixed.dtype))

    def _change(self) -> Tensor:
        """W_v − I."""
        values = at_least_float32(self.values)
        return values - torch.eye(len(values), device=values.device, dtype=values.dtype)
