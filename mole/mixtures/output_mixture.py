"""The mixture at the end of a post-norm sub-layer: what comes before the norm runs once, then all experts' branches.

It stands at the output module of a block, or at the norm of a split site, where h and x are taken as they pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from mole.backbones.joint import Joint
from mole.backbones.sites import Site
from mole.mixtures.adapter_mixture import MixtureLayer
from mole.mixtures.banks.branches import Ending
from mole.mixtures.fitting import Fit, fitted
from mole.routing import Frame, RoutingContext


class OutputMixture(MixtureLayer):
    """A MixtureLayer whose bank is an OutputBank. A router of the layer reads x, the residual."""

    @property
    def norm(self) -> Any:
        """The norm that closes the sub-layer."""
        return self.base.LayerNorm

    @property
    def bottleneck_path(self) -> str:
        """What experts call their bottleneck here."""
        return self.site

    @property
    def norm_path(self) -> str:
        """What experts call their norm here."""
        return f"{self.site}.LayerNorm"

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[1] if len(args) > 1 else kwargs["input_tensor"]

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:  # type: ignore[override]
        """`hidden_states` [B, T, d_in] of the sub-layer, `input_tensor` x [B, T, d] → [B, T, d]."""
        base: Any = self.base
        frame = self.context.current
        if frame is None or not frame.experts_enabled:
            return base(hidden_states, input_tensor)
        h = base.dropout(base.dense(hidden_states))
        return self._ended(h, input_tensor, h + input_tensor, frame)

    def _ended(self, h: Tensor, x: Tensor, total: Tensor, frame: Frame) -> Tensor:
        """y [B, T, d] of h, x and their sum."""
        norm = self.norm
        end = Ending(h, x, total, norm, norm(total))
        routing = self._routing(x, end, frame)
        if routing is None:
            return end.out
        frame.see(self.fit.site, routing)
        fitting, _ = fitted(routing, x, end.out, self.fit, frame)
        given = frame.fixed is not None or self.fit.site in frame.routings
        if self.router is not None and not given and "outputs" in self.router.needs:
            share: Tensor = self.router.value(self.bank.share(end, fitting))  # type: ignore[operator]
            return norm(total + share)
        mixed = self.bank.mixed(end, fitting)
        return mixed if self.flex is None else self.flex(mixed, x, frame)

    def _own(self, x: Tensor, base_out: Any, frame: Frame) -> Any:
        router, bank, end = self.router, self.bank, base_out
        assert router is not None
        if "outputs" not in router.needs:
            return super()._own(x, end.out, frame)
        return router(x, frame, outputs=bank.asked(end), inner=partial(bank.toward, end), present=bank.present)


class SplitMixture(OutputMixture):
    """The mixture at the norm of the split site `split`. It works once `join` has been called."""

    def __init__(self, base: nn.Module, bank: nn.Module, fit: Fit, context: RoutingContext, split: Site):
        super().__init__(base, bank, fit, context)
        self.split, self.joint = split, None

    def join(self, backbone: nn.Module) -> None:
        """From now on what the sub-layer of `backbone` reads and gives is seen."""
        self.joint = Joint(backbone, self.split)

    def part(self) -> None:
        """The end of that."""
        if self.joint is not None:
            self.joint.remove()

    @property
    def norm(self) -> Any:
        return self.base

    @property
    def bottleneck_path(self) -> str:
        return self.split.path

    @property
    def norm_path(self) -> str:
        return self.site

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert self.joint is not None, "join comes first"
        assert self.joint.x is not None, "asked while the norm does not run"
        return self.joint.x

    def forward(self, total: Tensor) -> Tensor:  # type: ignore[override]
        """`total` h + x [B, T, d] → [B, T, d]."""
        assert self.joint is not None, "join comes first"
        h, x = self.joint.take()
        frame = self.context.current
        if frame is None or not frame.experts_enabled:
            return self.base(total)
        return self._ended(h, x, total, frame)


def closing(layers: Mapping[str, MixtureLayer]) -> tuple[str, ...]:
    """The norms at which a whole sub-layer is mixed."""
    return tuple(path for path, layer in layers.items() if isinstance(layer, SplitMixture))
