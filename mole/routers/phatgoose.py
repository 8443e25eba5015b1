"""PHATGOOSE: every expert brings a gate vector trained after it, on its own data; tokens go to the best of them.

z_te = LN(x_t) · LN(v_e) / √d, which is √d times their correlation, so no gate is larger than another by its size alone.
How the gates are trained: router `gate`. Muqeeth et al. 2024, arXiv 2402.05859.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mole.registry import ROUTERS, config_dataclass
from mole.routers.prototypes import Norm, Prototyped, PrototypeRouter


@config_dataclass
class PhatgooseConfig(Prototyped):
    """Scores, and the training of the gates: `gate_steps` steps of `gate_batch` examples with warm-up and linear
    decay of the rate `gate_lr`; `seed` orders the examples.
    """

    name: Literal["phatgoose"] = "phatgoose"
    top_k: Annotated[int, Field(ge=1)] | None = 2
    temperature: Annotated[float, Field(gt=0)] | None = None
    input_norm: Norm = "layer"
    prototype_norm: Norm = "layer"
    score: Literal["dot", "cosine"] = "dot"
    gate_steps: Annotated[int, Field(ge=1)] = 100
    gate_lr: Annotated[float, Field(gt=0)] = 1e-3
    gate_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    gate_batch: Annotated[int, Field(ge=1)] = 4
    seed: int = 42

    def __post_init__(self):
        if problems := self.placing_problems():
            raise ValueError("\n".join(problems))


@ROUTERS.register("phatgoose", PhatgooseConfig)
class PhatgooseRouter(PrototypeRouter):
    """Per token, per module or group of modules; `prototypes` are the trained gates."""

    needs = frozenset({"prototypes"})
