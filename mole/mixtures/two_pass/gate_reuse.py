"""Gates reused while decoding: pass 1 every n-th token, or not at all after k. Approximations, off by default.

`gate_refresh=n` runs the routing pass at every n-th decode step, over all tokens that it has not seen, in one call, so
that its cache has no gaps; in between the last gates are spent again. `gate_freeze_after=k` keeps, for each sequence,
the gates of decode step k. Whatever is no single decode step (a prompt, a further turn, a checked draft) is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mole.mixtures.two_pass.cache import TwoStreamCache
from mole.routers import Router
from mole.routing import Frame, Routing

RoutingPass = Callable[[dict[str, Any]], Tensor]


@dataclass
class GateReuse:
    """What a pair of caches carries beside its streams.

    `ids` and `positions` [B, p] are the tokens that the routing pass has yet to see, `gates` the routings [B, 1, K] of
    the last token that it saw, `steps` the decode steps since the last exact forward.
    """

    ids: Tensor | None = None
    positions: Tensor | None = None
    gates: tuple[Routing, ...] = ()
    steps: int = 0

    @property
    def behind(self) -> int:
        """Tokens that the routing pass has yet to see."""
        return 0 if self.ids is None else self.ids.shape[1]

    def is_due(self, router: Router) -> bool:
        """Whether the routing pass runs at this decode step."""
        if not self.gates:
            return True
        if router.gate_freeze_after is not None and self.steps >= router.gate_freeze_after:
            return False
        return (self.steps + 1) % router.gate_refresh == 0

    def wait(self, inputs: dict[str, Any]) -> None:
        """The token of these inputs is one more to see later."""
        positions = inputs.get("position_ids")
        self.ids = _joined(self.ids, inputs["input_ids"])
        self.positions = None if positions is None else _joined(self.positions, positions)

    def with_waiting(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs`, preceded by the tokens that wait; nothing waits any more."""
        if self.ids is None:
            return inputs
        if (mask := inputs.get("attention_mask")) is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ValueError(
                "gates were reused, and the routing pass now reads more tokens than the attention_mask is made for: "
                "use a cache that grows (no cache_implementation), or gate_refresh=1 and gate_freeze_after=null"
            )
        if "input_ids" not in inputs:
            raise ValueError("gates were reused, so the forward after them needs input_ids, not inputs_embeds")
        inputs = {**inputs, "input_ids": _joined(self.ids, inputs["input_ids"])}
        if self.positions is not None and "position_ids" in inputs:
            inputs["position_ids"] = _joined(self.positions, inputs["position_ids"])
        self.ids = self.positions = None
        return inputs

    def forget(self, tokens: int) -> int:
        """Drops up to `tokens` waiting tokens from the end; returns how many the routing pass has to drop itself."""
        dropped = min(tokens, self.behind)
        if dropped and self.ids is not None:
            kept = self.ids.shape[1] - dropped
            self.ids = self.ids[:, :kept] if kept else None
            self.positions = self.positions[:, :kept] if kept and self.positions is not None else None
        self.gates = ()  # they may be those of a token that is gone
        return tokens - dropped

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """The batch changes: rows were chosen, repeated or moved."""
        self.ids = None if self.ids is None else change(self.ids)
        self.positions = None if self.positions is None else change(self.positions)
        made: dict[int, Routing] = {}
        for routing in self.gates:
            if id(routing) not in made:
                made[id(routing)] = _changed(routing, change)
        self.gates = tuple(made[id(routing)] for routing in self.gates)


def route(
    router: Router, frame: Frame, inputs: dict[str, Any], pair: TwoStreamCache | None, routing_pass: RoutingPass
) -> Routing | tuple[Routing, ...]:
    """The routing of this forward, from a routing pass now or from an earlier one."""
    reuses = router.gate_refresh > 1 or router.gate_freeze_after is not None
    if not reuses or pair is None or not frame.generating:
        return _fresh(router, frame, routing_pass(inputs))
    if router.gate_refresh > 1 and pair.is_compileable:
        raise ValueError(
            f"gate_refresh={router.gate_refresh} reads several tokens in a routing pass, and masks of a static cache "
            "are made for one: leave cache_implementation out, or set gate_refresh=1"
        )
    if pair.reuse is None:
        pair.reuse = GateReuse()
    reuse, tokens = pair.reuse, inputs.get("input_ids")
    decoding = tokens is not None and tokens.shape[1] == 1 and pair.get_seq_length() > 0
    if decoding and not reuse.is_due(router):
        reuse.wait(inputs)
        reuse.steps += 1
        return reuse.gates
    length = (inputs["input_ids"] if tokens is not None else inputs["inputs_embeds"]).shape[1]
    hidden = routing_pass(reuse.with_waiting(inputs))
    routed = _fresh(router, frame, hidden[:, -length:])
    reuse.steps = reuse.steps + 1 if decoding else 0
    made: dict[int, Routing] = {}
    routings = routed if isinstance(routed, tuple) else (routed,)
    for routing in routings:
        if id(routing) not in made:
            made[id(routing)] = _changed(routing.detach(), lambda tensor: tensor[:, -1:])
    reuse.gates = tuple(made[id(routing)] for routing in routings)
    return routed


def _fresh(router: Router, frame: Frame, hidden: Tensor) -> Routing | tuple[Routing, ...]:
    frame.inputs = replace(frame.inputs, hidden_states=hidden)
    return router(None, frame)


def _joined(before: Tensor | None, now: Tensor) -> Tensor:
    return now if before is None else torch.cat([before, now], dim=1)


def _changed(routing: Routing, change: Callable[[Tensor], Tensor]) -> Routing:
    """The routing with `change` done to its tensors."""
    ids, predicted = routing.expert_ids, routing.predicted
    return Routing(
        change(routing.weights),
        None if ids is None else change(ids),
        predicted=None if predicted is None else change(predicted),
    )
