"""The mixture at the output module of a post-norm block: its parts run once, then the branches of all experts."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from mole.mixtures.adapter_mixture import MixtureLayer
from mole.mixtures.banks.branches import Ending
from mole.mixtures.fitting import fitted
from mole.routing import Frame


class OutputMixture(MixtureLayer):
    """A MixtureLayer whose bank is an OutputBank. A router of the layer reads x, the residual."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:  # type: ignore[override]
        """`hidden_states` [B, T, d_in] of the sub-layer, `input_tensor` x [B, T, d] → [B, T, d]."""
        base: Any = self.base
        frame = self.context.current
        if frame is None or not frame.experts_enabled:
            return base(hidden_states, input_tensor)
        h = base.dropout(base.dense(hidden_states))
        total = h + input_tensor
        end = Ending(h, input_tensor, total, base.LayerNorm, base.LayerNorm(total))
        routing = self._routing(input_tensor, end, frame)
        if routing is None:
            return end.out
        if frame.recording:
            frame.seen[self.fit.site] = routing
        fitting, _ = fitted(routing, input_tensor, end.out, self.fit, frame)
        given = frame.fixed is not None or self.fit.site in frame.routings
        if self.router is not None and not given and "outputs" in self.router.needs:
            share: Tensor = self.router.value(self.bank.share(end, fitting))  # type: ignore[operator]
            return base.LayerNorm(total + share)
        mixed = self.bank.mixed(end, fitting)
        return mixed if self.flex is None else self.flex(mixed, input_tensor, frame)

    def _own(self, x: Tensor, base_out: Any, frame: Frame) -> Any:
        router, bank, end = self.router, self.bank, base_out
        assert router is not None
        if "outputs" not in router.needs:
            return super()._own(x, end.out, frame)
        return router(x, frame, outputs=bank.asked(end), inner=partial(bank.toward, end), present=bank.present)
