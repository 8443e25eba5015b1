"""The mixture layer: y = base(x) + Σ_e w_e δ_e(x), at one module of the backbone. There is only this one.

It knows neither how a routing is made nor what an expert is: the bank holds the experts, the context's current frame
has the routing. Outside a frame, or with the experts off, it is the wrapped module, bit for bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mole.mixtures.banks import LoraBank
from mole.routers import Router
from mole.routing import Frame, Routing, RoutingContext


class MixtureLayer(nn.Module):
    """Wraps `base`; the wrapped object itself is neither copied nor changed, unknown attributes are its own.

    `site` is the module's path in the backbone. `router` is the layer's own one, None where one router serves the
    whole model.
    """

    def __init__(self, base: nn.Module, bank: LoraBank, site: str, context: RoutingContext):
        super().__init__()
        self.base = base
        self.bank = bank
        self.router: Router | None = None
        self.site = site
        self.context = context

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` [B, T, d_in], or its flat view [B·T, d_in] → the base module's output plus the experts' share."""
        modules = self._modules  # a lookup by attribute passes through two `__getattr__`
        base_out = modules["base"](x, *args, **kwargs)  # type: ignore[misc]
        frame = self.context.current
        if frame is None or not frame.experts_enabled:
            return base_out
        rows = x[None] if x.dim() == 2 else x
        routing = self._routing(rows, frame)
        if frame.recording:
            frame.seen[self.site] = routing
        routing = _fit(routing, rows, x.dim(), self.site)
        return modules["bank"](base_out, rows, routing)  # type: ignore[misc]

    def _routing(self, rows: Tensor, frame: Frame) -> Routing:
        if frame.fixed is not None:
            return frame.fixed
        if self.site in frame.routings:
            return frame.routings[self.site]
        assert self.router is not None, f"no routing was made for {self.site}"
        routing = self.router(rows, frame)
        assert isinstance(routing, Routing), "a router of scope layer gives one routing"
        return routing


def _fit(routing: Routing, rows: Tensor, dims: int, site: str) -> Routing:
    """The routing in the shape of `rows` [B, T, d]: flat inputs [B·T, d] get the flat view of [B, T] weights."""
    shape = routing.weights.shape
    if shape[0] in (1, rows.shape[0]) and shape[1] in (1, rows.shape[1]):
        return routing
    if dims == 2 and shape[0] * shape[1] == rows.shape[1]:
        ids = routing.expert_ids
        flat = None if ids is None else ids.expand_as(routing.weights).flatten(0, 1)[None]
        return Routing(routing.weights.flatten(0, 1)[None], flat)
    raise ValueError(
        f"the routing for {site} has shape {tuple(shape)}, which fits no input of shape {tuple(rows.shape)}: "
        "weights must be [1|B, 1|T, K]"
    )
