"""The router contract: inputs → Routing. A router calls no expert; a mixture calls no router's internals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mole.registry import config_dataclass
from mole.routing import Frame, Routing

Scope = Literal["layer", "model"]


@config_dataclass
class Combining:
    """How the experts of one module become one change of its output; fields of every router's config.

    `combine` outputs: Σ_e w_e s_e B_e A_e x; parameters: (Σ_e w_e s_e B_e)(Σ_e w_e A_e) x, which is another function
    unless the routing is one-hot. `missing` what becomes of the weight of an expert that has nothing at a module:
    lost (drop), or given to those present there in proportion (renormalise).
    """

    combine: Literal["outputs", "parameters"] = "outputs"
    missing: Literal["drop", "renormalise"] = "drop"


@config_dataclass
class Placing:
    """Which modules share one router; fields of the configs of routers that read a module's input.

    `scope` layer: each module its own; block: the modules of one repeated block of the backbone; group: those with
    equal captures of the regular expression `group_by`, or `num_groups` runs of neighbours; model: all of them. The
    first module of a group routes, the others reuse its routing. `rest` modules that `group_by` does not match: an
    error, or each its own router.
    """

    scope: Literal["layer", "block", "group", "model"] = "layer"
    group_by: str | None = None
    num_groups: Annotated[int, Field(ge=1)] | None = None
    rest: Literal["error", "layer"] = "error"

    def placing_problems(self) -> list[str]:
        """What is wrong with these fields together."""
        given = [name for name in ("group_by", "num_groups") if getattr(self, name) is not None]
        if self.scope == "group" and len(given) != 1:
            return ["router.scope=group needs router.group_by or router.num_groups, one of them"]
        if self.scope != "group" and given:
            return [f"router.{given[0]} needs router.scope=group"]
        return []


@config_dataclass
class Learning:
    """How a router trains; fields of the configs of routers that learn.

    `expert_dropout` probability with which an expert is left out of an example, in training only, never all of them.
    `lr`, `weight_decay` of the router's parameters where they are not those of the run.
    """

    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None


@dataclass(frozen=True)
class MixtureShape:
    """What a router may know of the mixture that it serves; the order of experts is the mixture's, never sorted.

    `expert_tasks` the tasks that each expert's card lists. `sites` the paths of the L mixed modules, in the backbone's
    order. `hidden_size` H, the width of the backbone's last hidden state. `closing` those of the sites that are norms
    and stand for the whole sub-layer that they close.
    """

    expert_names: tuple[str, ...]
    expert_tasks: tuple[tuple[str, ...], ...]
    sites: tuple[str, ...]
    hidden_size: int
    closing: tuple[str, ...] = ()

    @property
    def num_experts(self) -> int:
        return len(self.expert_names)

    @property
    def num_sites(self) -> int:
        return len(self.sites)


class Router(nn.Module):
    """Base of all routers.

    `scope` layer: an instance per mixed module, or per group of them, called with the (first) module's input x.
            model: one instance for the model, called once per forward before the layers run.
    `learned` whether it has parameters, which a run must train before it means anything.
    `needs` what the caller must give: names of `RoutingInputs`, of which `hidden_states` asks for a routing pass;
            `experts`: their weights, once after building; `prototypes`: made from data before the mixture is used;
            `outputs`: the experts' share in a direction, see `MixtureLayer`; `embeddings`: those of the input ids.
    `keeps` its values per example are made while the prompt is read, and stay while `generate` goes on.
    `clipped` whether its gradients count in the norm that is clipped, and are scaled with it.
    `expert_axes` name in the state → its axis over the experts.
    `open_shapes` names in the state whose shape data decided: a saved one is taken as it is, and checked afterwards.

    A router of scope `layer` is built with `input_dim`, the width of its module's input, and the `sites` it serves.
    What `state_dict()` holds is saved and loaded with the mixture.
    """

    scope: ClassVar[Scope] = "model"
    learned: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    keeps: ClassVar[bool] = False
    clipped: ClassVar[bool] = True
    expert_axes: ClassVar[Mapping[str, int]] = {}
    open_shapes: ClassVar[frozenset[str]] = frozenset()
    # Blocks of the features that have weights of their own; the widths of all modules must be multiples.
    num_splits: int = 1
    # Whether the routing of a token depends on later ones: not for backbones that read from left to right.
    reads_ahead: bool = False
    # Approximations while decoding, for routers with a routing pass: see mixtures/two_pass/gate_reuse.py.
    gate_refresh: int = 1
    gate_freeze_after: int | None = None

    def __init__(
        self, config: Any, shape: MixtureShape, *, input_dim: int | None = None, sites: Sequence[str] | None = None
    ):
        super().__init__()
        self.config = config
        self.shape = shape
        self.input_dim = input_dim
        self.sites = shape.sites if sites is None else tuple(sites)

    def forward(self, x: Tensor | None, frame: Frame) -> Routing | tuple[Routing, ...]:
        """`x` [B, T, d_in] for scope `layer`, None for scope `model` → one Routing; or, for scope `model`, a tuple
        with one Routing for each site.
        """
        raise NotImplementedError

    def take_experts(self, weights: Sequence[Mapping[int, Any]]) -> None:
        """For routers that need `experts`: for each of `sites`, mixture index → the expert's weights there.

        Called once, when the router is new; a saved router has what it took in its state.
        """
        raise NotImplementedError

    def check_state(self) -> None:
        """Raises ValueError if a state was loaded that no router of this config over these experts has."""

    def check_tasks(self, tasks: Sequence[str], *, training: bool) -> None:
        """Raises ValueError, with the way out, for a task of which it could route no example, in training or not."""

    def own_statistics(self) -> dict[str, Any]:
        """What it says of itself at every logged step, beside what its routings show: a number, or {name: number}."""
        return {}

    def mergeable(self) -> Tensor | tuple[Tensor, ...]:
        """The weights [E] that every token gets, or one such tensor for each site; ValueError if tokens differ."""
        raise ValueError(f"router={self.config.name} weighs each input anew: no single expert does the same")

    def routing_pass_weights(self) -> Routing | None:
        """The constant routing of the routing pass; None: no expert at all, the pass is the plain backbone."""
        return None

    def fingerprint(self) -> tuple:
        """Changes when the routing of the same input would: KV caches filled before such a change are refused."""
        return (repr(self.config), tuple(p._version for p in self.parameters()))

    def carry(self, old: Router) -> None:
        """Takes over what `old`, a router of the same config over other experts, has learned.

        Of a tensor over experts the rows of those experts that both have, by name; every other tensor whole, unless
        its shape changed. A row of a new expert stays as it was built.
        """
        here = {name: index for index, name in enumerate(self.shape.expert_names)}
        pairs = [(here[name], row) for row, name in enumerate(old.shape.expert_names) if name in here]
        mine, theirs = self.state_dict(), old.state_dict()
        with torch.no_grad():
            for name, tensor in mine.items():
                if name not in theirs:  # of a setting that the old one was without
                    continue
                if name in self.expert_axes:
                    axis = self.expert_axes[name]
                    for to, source in pairs:
                        tensor.select(axis, to).copy_(theirs[name].select(axis, source))
                elif theirs[name].shape == tensor.shape:
                    tensor.copy_(theirs[name])


def dropped(logits: Tensor, probability: float, training: bool) -> Tensor:
    """`logits` [.., E] with −inf for the experts left out; of each row ([E], or [B, .., E] per example) one stays."""
    if not training or probability == 0:
        return logits
    lead = (logits.shape[0], *(1,) * (logits.dim() - 2)) if logits.dim() > 1 else ()
    chance = torch.rand(*lead, logits.shape[-1], device=logits.device)
    keep = (chance >= probability) | (chance == chance.amax(-1, keepdim=True))
    return logits.masked_fill(~keep, float("-inf"))
