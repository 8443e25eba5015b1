"""What new bottlenecks look like: one method, and the settings that three papers gave it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from transformers.activations import ACT2FN

from mole.registry import config_dataclass, unknown

Placement = Literal["houlsby", "pfeiffer", "parallel"]
Size = Annotated[int, Field(ge=1, le=65536)]
Factor = Annotated[float, Field(gt=0)]


@config_dataclass
class BottleneckConfig:
    """Fields of all three presets.

    `size` or `reduction_factor` (of the width: size = ⌊d / factor⌋), each a number or block → number with `default`.
    `init` zero_up: D ~ N(0, init_std²), the rest 0, so that nothing is changed at first; normal: both matrices
    N(0, init_std²); trunc_normal: the same cut at two standard deviations. `train_norms` all norms of the backbone,
    those that close `sites`, or none. `sites` see mole/backbones/sites.py, for families that its table lacks.
    """

    name: str
    placement: Placement
    size: Size | dict[str, Size] | None = None
    reduction_factor: Factor | dict[str, Factor] | None = None
    activation: str = "relu"
    init: Literal["zero_up", "normal", "trunc_normal"] = "zero_up"
    init_std: Annotated[float, Field(gt=0)] = 0.02
    scale: Annotated[float, Field(gt=0)] | Literal["learned"] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    train_norms: Literal["all", "sites", "none"] = "none"
    train_pooler: bool = True
    sites: dict[str, str] | None = None

    def __post_init__(self) -> None:
        problems = []
        if (self.size is None) == (self.reduction_factor is None):
            problems.append("adapter.size and adapter.reduction_factor: exactly one of them is given, the other null")
        for field in ("size", "reduction_factor"):
            value = getattr(self, field)
            if isinstance(value, dict) and (odd := [key for key in value if key != "default" and not key.isdigit()]):
                problems.append(f"adapter.{field}: {odd[0]!r} is no number of a block, and not default")
        if self.activation not in ACT2FN or self.activation == "xielu":
            problems.append(f"adapter.activation: {unknown('activation', self.activation, ACT2FN)}")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            problems.append(f"adapter.layers={list(self.layers)}: name at least one block, each once; null: all")
        if problems:
            raise ValueError("; ".join(problems))


@config_dataclass
class HoulsbyConfig(BottleneckConfig):
    """After attention and feed-forward, all norms trained along."""

    name: Literal["houlsby"] = "houlsby"  # type: ignore[assignment]
    placement: Literal["houlsby"] = "houlsby"  # type: ignore[assignment]
    size: Size | dict[str, Size] | None = 64
    activation: str = "gelu"
    train_norms: Literal["all", "sites", "none"] = "all"


@config_dataclass
class PfeifferConfig(BottleneckConfig):
    """After the feed-forward alone, norms frozen (AdapterHub's seq_bn)."""

    name: Literal["pfeiffer"] = "pfeiffer"  # type: ignore[assignment]
    placement: Literal["pfeiffer"] = "pfeiffer"  # type: ignore[assignment]
    reduction_factor: Factor | dict[str, Factor] | None = 16.0


@config_dataclass
class ParallelConfig(BottleneckConfig):
    """Beside the feed-forward (AdapterHub's par_bn)."""

    name: Literal["parallel"] = "parallel"  # type: ignore[assignment]
    placement: Literal["parallel"] = "parallel"  # type: ignore[assignment]
    reduction_factor: Factor | dict[str, Factor] | None = 2.0
    scale: Annotated[float, Field(gt=0)] | Literal["learned"] = 4.0


def at_block(value: Any, layer: int, field: str) -> float:
    """The number for block `layer`: `value` itself, or what the mapping has for it. ValueError if it has nothing."""
    if not isinstance(value, dict):
        return value
    if str(layer) not in value and "default" not in value:
        raise ValueError(f"adapter.{field} has nothing for block {layer}, and no default")
    return value[str(layer) if str(layer) in value else "default"]
