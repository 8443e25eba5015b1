"""Average activation: tokens go to the experts whose own data looks most like them, module by module.

v_e is the mean of the module's inputs on the expert's data, of length 1; z_te = cos(x_t, v_e) / temperature. The
baseline of PHATGOOSE (arXiv 2402.05859); wiki-experts' version is score=dot with temperature=null (√d).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mole.registry import ROUTERS, config_dataclass
from mole.routers.prototypes import Norm, Prototyped, PrototypeRouter


@config_dataclass
class AverageActivationConfig(Prototyped):
    """Scores, and what is averaged: over `max_samples` examples of each task of an expert, the mean of their tokens
    or the last of them (`pool`), with the backbone alone or with the expert at work (`with_expert`).
    """

    name: Literal["average_activation"] = "average_activation"
    top_k: Annotated[int, Field(ge=1)] | None = 2
    temperature: Annotated[float, Field(gt=0)] | None = 0.1
    input_norm: Norm = "none"
    prototype_norm: Norm = "none"
    score: Literal["cosine", "dot"] = "cosine"
    max_samples: Annotated[int, Field(ge=1)] = 10
    pool: Literal["mean", "last"] = "mean"
    with_expert: bool = False

    def __post_init__(self):
        if problems := self.placing_problems():
            raise ValueError("\n".join(problems))


@ROUTERS.register("average_activation", AverageActivationConfig)
class AverageActivationRouter(PrototypeRouter):
    """Per token, per module or group of modules; `prototypes` are the mean inputs."""

    needs = frozenset({"prototypes"})
