"""What routers by prototypes share: a vector v_e per expert, scored against every token of a module's input.

    z_te = score(norm(x_t), norm(v_e)) / temperature;   w = softmax over the k best

Legend: B examples, T tokens, E experts, K chosen, d the width of the module's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mole.registry import config_dataclass
from mole.routers.base import Combining, MixtureShape, Placing, Router
from mole.routers.float32 import at_least_float32, without_autocast
from mole.routers.selection import largest
from mole.routing import EMPTY, Frame, Routing

Norm = Literal["none", "layer", "unit"]
ABSENT = -1e30  # the score of an expert that is not there: as good as −∞, but differences of it are no NaN
_NEARLY = 1e-6 * ABSENT  # no score of an expert that is there is below it; one divided by a temperature still is


@config_dataclass
class Prototyped(Combining, Placing):
    """Fields that all routers by prototypes have.

    `top_k` at most so many experts per token, null for all. `norm_topk` softmax over those kept, else over all.
    `temperature` divides the scores, null: √d. `input_norm` layer: zero mean and unit variance over the features,
    without affine; unit: length 1.
    """

    top_k: Annotated[int, Field(ge=1)] | None = None
    norm_topk: bool = True
    temperature: Annotated[float, Field(gt=0)] | None = 1.0
    input_norm: Norm = "none"


def normed(x: Tensor, how: str) -> Tensor:
    """`x` [.., d] normalised over its features."""
    if how == "layer":
        return F.layer_norm(x, x.shape[-1:])
    return F.normalize(x, dim=-1) if how == "unit" else x


def best(logits: Tensor, k: int | None, *, normalise: bool) -> Routing:
    """At most k experts of `logits` [B, T, E] by softmax, over those kept (`normalise`) or over all; dense if k ≥ E.

    What is `ABSENT` is never kept: its slot is empty.
    """
    if k is None or k >= logits.shape[-1]:
        return Routing(torch.softmax(logits, dim=-1).masked_fill(logits < _NEARLY, 0.0), logits=logits)
    ids = largest(logits.detach(), k)
    kept = logits.gather(-1, ids)
    weights = torch.softmax(kept, dim=-1) if normalise else torch.softmax(logits, dim=-1).gather(-1, ids)
    empty = kept < _NEARLY
    return Routing(weights.masked_fill(empty, 0.0), ids.masked_fill(empty, EMPTY), logits=logits)


class PrototypeRouter(Router):
    """`prototypes` [E, d] and which experts have one here, `present` bool [E]; the others are never chosen."""

    scope = "layer"
    signless: ClassVar[bool] = False  # singular vectors, say, whose sign means nothing
    expert_axes: ClassVar[Mapping[str, int]] = {"prototypes": 0, "present": 0}
    prototypes: Tensor
    present: Tensor

    def __init__(self, config: Any, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        assert self.input_dim is not None, "a router of scope layer is built with the width of its input"
        self.register_buffer("prototypes", torch.zeros(shape.num_experts, self.input_dim))
        self.register_buffer("present", torch.zeros(shape.num_experts, dtype=torch.bool))
        self._is_ready = False

    @property
    def temperature(self) -> float:
        """What divides the scores."""
        return self.prototypes.shape[-1] ** 0.5 if self.config.temperature is None else self.config.temperature

    def take_prototypes(self, found: Mapping[int, Tensor]) -> None:
        """The prototypes [d] of these experts, by mixture index; those of the others stay."""
        with torch.no_grad():
            for index, vector in found.items():
                self.prototypes[index].copy_(vector)
                self.present[index] = True

    def fingerprint(self) -> tuple:
        return (*super().fingerprint(), *(buffer._version for buffer in self.buffers()))

    def scores(self, x: Tensor) -> Tensor:
        """`x` [B, T, d] → [B, T, E], before the temperature."""
        x, v = (normed(t, how) for t, how in ((x, self.config.input_norm), (self._v(), self.config.prototype_norm)))
        kind = self.config.score
        if kind.endswith("cosine"):
            x, v = normed(x, "unit"), normed(v, "unit")
        found = x @ v.T
        return found.abs() if kind.startswith("abs_") else found

    def angles(self, x: Tensor) -> Tensor:
        """`x` [B, T, d] → cosines with the prototypes [B, T, E], sizes alone where `signless`; 0 without one."""
        cosines = normed(x.to(self._v().dtype), "unit") @ normed(self._v(), "unit").T
        return cosines.abs() if self.signless else cosines

    def _v(self) -> Tensor:
        return at_least_float32(self.prototypes)

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """`x` [B, T, d] → weights [B, T, K] with expert ids, or dense [B, T, E] if all experts are kept.

        Raises ValueError as long as no expert has a prototype.
        """
        assert x is not None
        self._require_ready()
        with without_autocast(x):
            logits = self.scores(x.to(self._v().dtype)) / self.temperature
            routing = self._routing(logits.masked_fill(~self._allowed(), ABSENT))
            return replace(routing, angles=self.angles(x.detach())) if frame.recording else routing

    def _allowed(self) -> Tensor:
        """Which experts may be chosen, bool [E]."""
        return self.present

    def _routing(self, logits: Tensor) -> Routing:
        """`logits` [B, T, E], `ABSENT` where an expert cannot be chosen → the k best of the others."""
        return best(logits, self.config.top_k, normalise=self.config.norm_topk)

    def _require_ready(self) -> None:
        """Looks once, as it waits for the device; a trace relies on an earlier look."""
        if self._is_ready or torch.compiler.is_compiling():
            return
        if not bool(self.present.any()):
            raise ValueError(
                f"router={self.config.name} has no prototypes yet for {', '.join(self.sites[:2])}: they are made by "
                f"mole build-moe router={self.config.name} dataset=[…], from data of the experts' tasks"
            )
        self._is_ready = True
