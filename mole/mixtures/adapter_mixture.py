"""The mixture layer: y = base(x) + Σ_e w_e δ_e(x), at one module of the backbone. There is only this one.

It knows neither how a routing is made nor what an expert is: the bank holds the experts, the context's current frame
has the routing. Outside a frame, or with the experts off, it is the wrapped module, bit for bit; a call of the whole
backbone has a frame (see bare.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from mole.mixtures.fitting import Fit, fitted
from mole.mixtures.keeping import kept
from mole.routers import Router
from mole.routing import Frame, Routing, RoutingContext


class MixtureLayer(nn.Module):
    """Wraps `base`; the wrapped object itself is neither copied nor changed, unknown attributes are its own.

    `bank` holds the experts (see mixtures/banks), `fit` says how the module's rows find their gates. `router` is the
    layer's own one; None where one router serves the whole model, or the first layer of a `group` has it.
    """

    def __init__(self, base: nn.Module, bank: nn.Module, fit: Fit, context: RoutingContext):
        super().__init__()
        self.base = base
        self.bank: Any = bank
        self.fit = fit
        self.router: Router | None = None
        self.group: str | None = None  # whose modules spend one routing, made by the first of them
        self.flex: nn.Module | None = None  # what is trained after the mix, see flex.py
        self.weighs_base = True  # not where a mixed module inside of it ends the same sub-layer
        self.context = context

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @property
    def site(self) -> str:
        """The module's path in the backbone."""
        return self.fit.site

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What a router of the layer reads in a call with these arguments."""
        return args[0] if args else kwargs["hidden_states"]  # of a linear module, or of an attention

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base module's input → its output plus the experts' share."""
        parts = self._modules  # looking these up as attributes takes longer than an expert does
        base_out = parts["base"](x, *args, **kwargs)  # type: ignore[misc]
        frame = self.context.current
        if frame is None or not frame.experts_enabled:
            return base_out
        routing = self._routing(x, base_out, frame)
        if routing is None:
            return base_out
        frame.see(self.fit.site, routing)
        fitting, rows = fitted(routing, x, base_out, self.fit, frame)
        given = frame.fixed is not None or self.fit.site in frame.routings  # by another than this layer's router
        if self.router is not None and not given and "outputs" in self.router.needs:
            # What such a router does to the experts' share is its own; the module's output takes no part in it.
            share = parts["bank"].delta(base_out, rows, fitting)  # type: ignore[union-attr]
            return base_out + self.router.value(share)  # type: ignore[operator]
        out = parts["bank"](base_out, rows, fitting)  # type: ignore[misc]
        if fitting.base is not None and self.weighs_base and not self.bank.mixes_base:
            out = out + self._surplus(fitting, rows, base_out)
        return out if self.flex is None else self.flex(out, None, frame)

    def _surplus(self, routing: Routing, rows: Tensor, base_out: Tensor) -> Tensor:
        """`base_out` times what experts and backbone together have above 1: every expert brings the backbone along."""
        assert routing.base is not None
        assert routing.base is not None
        above = (routing.dense(self.fit.num_experts).sum(-1, keepdim=True) + routing.base - 1.0).to(base_out.dtype)
        if self.fit.takes == "channels":
            shape = above.shape[0], 1, *(1,) * (base_out.dim() - 3), above.shape[1]
            return above.reshape(shape) * base_out
        if self.fit.takes == "ids":
            return above * base_out
        lead = rows.shape[:-1] if self.fit.takes == "features" else (1,) * (3 - base_out.dim()) + base_out.shape[:-1]
        return (above * base_out.reshape(*lead, -1)).reshape(base_out.shape)

    def _routing(self, x: Tensor, base_out: Any, frame: Frame) -> Routing | None:
        """None where the module is called on its own, outside a forward of the model."""
        if frame.fixed is not None:
            return frame.fixed
        if self.fit.site in frame.routings:
            return frame.routings[self.fit.site]
        if self.router is None:
            if self.group is not None:
                return self._shared(frame)
            assert not frame.routings, f"no routing was made for {self.fit.site}"
            return None
        routing = self._own(x, base_out, frame) if frame.packing is None else self._of_packed(x, base_out, frame)
        assert isinstance(routing, Routing), "a router of scope layer gives one routing"
        if self.group is not None:
            frame.shared[self.group] = routing
        return routing

    def _of_packed(self, x: Tensor, base_out: Any, frame: Frame) -> Any:
        """What this layer's router says of each sample of packed rows, as the rows spend it."""
        packing, router = frame.packing, self.router
        assert packing is not None
        assert router is not None
        if "outputs" in router.needs:  # such a router goes token by token
            return packing.marked(self._own(x, base_out, frame))
        return packing.together(self._own(packing.apart(x), base_out, frame))

    def _own(self, x: Tensor, base_out: Any, frame: Frame) -> Any:
        """What this layer's router says; what it said at the prompt, if it keeps that while generating."""
        router: Any = self.router
        rows = x[None] if x.dim() == 2 else x
        if "outputs" in router.needs:
            inner = partial(self.bank.inner, base_out, rows)
            outputs = base_out.reshape(*rows.shape[:-1], -1)
            return router(rows, frame, outputs=outputs, inner=inner, present=self.bank.present)
        if not router.keeps:
            return router(rows, frame)
        return kept(frame, self.fit.site, len(rows), partial(router, rows, frame))

    def _shared(self, frame: Frame) -> Routing:
        if self.group not in frame.shared:
            raise ValueError(
                f"{self.fit.site} runs before the first module of its group {self.group!r}, which routes for it: "
                "choose another router.group_by"
            )
        return frame.shared[self.group]
