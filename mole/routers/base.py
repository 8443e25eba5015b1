"""The router contract: inputs → Routing. A router calls no expert; a mixture calls no router's internals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mole.routing import Frame, Routing

Scope = Literal["layer", "model"]


@dataclass(frozen=True)
class MixtureShape:
    """What a router may know of the mixture that it serves; the order of experts is the mixture's, never sorted.

    `expert_tasks` the tasks that each expert's card lists. `num_sites` L, the mixed modules of the backbone.
    `hidden_size` H, the width of the backbone's last hidden state.
    """

    expert_names: tuple[str, ...]
    expert_tasks: tuple[tuple[str, ...], ...]
    num_sites: int
    hidden_size: int

    @property
    def num_experts(self) -> int:
        return len(self.expert_names)


class Router(nn.Module):
    """Base of all routers.

    `scope` layer: one instance per mixed module, called with that module's input x.
            model: one instance for the model, called once per forward before the layers run.
    `learned` whether it has parameters, which a run must train before it means anything.
    `needs` names of `RoutingInputs` that the caller must give; `hidden_states` asks for a routing pass.

    A router of scope `layer` is built with `input_dim`, the width of its module's input.
    """

    scope: ClassVar[Scope] = "model"
    learned: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    # Approximations while decoding, for routers with a routing pass: see mixtures/gate_reuse.py.
    gate_refresh: int = 1
    gate_freeze_after: int | None = None

    def __init__(self, config: Any, shape: MixtureShape, *, input_dim: int | None = None):
        super().__init__()
        self.config = config
        self.shape = shape
        self.input_dim = input_dim

    def forward(self, x: Tensor | None, frame: Frame) -> Routing | tuple[Routing, ...]:
        """`x` [B, T, d_in] for scope `layer`, None for scope `model` → one Routing; or, for scope `model`, a tuple
        with one Routing for each site.
        """
        raise NotImplementedError

    def routing_pass_weights(self) -> Routing | None:
        """The constant routing of the routing pass; None: no expert at all, the pass is the plain backbone."""
        return None

    def fingerprint(self) -> tuple:
        """Changes when the routing of the same input would: KV caches filled before such a change are refused."""
        return (repr(self.config), tuple(p._version for p in self.parameters()))
