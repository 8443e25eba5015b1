"""Many experts → one: the walk over layers that all methods share, and the report of what it cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mole.adapters import Adapter, LoraWeights
from mole.adapters.peft_tensors import MAX_RANK
from mole.merging.base import Merge
from mole.merging.deltas import Form, Layer, layers_of
from mole.merging.parameters import averaged
from mole.merging.products import Dense, LowRank, Product, check_rank, fit
from mole.merging.whole import common_base_weights, merged_biases, merged_modules
from mole.registry import MERGES, unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class LayerReport:
    """One module: the rank of its result, ‖ΔW‖_F, what the rank lost of it (relative), and the first σ that it lost.

    ‖Δy‖ ≤ `next_sigma` ‖x‖ for every input. `facts` are a method's own: `disputed` of TIES, the share of entries with
    both signs among the experts.
    """

    path: str
    rank: int
    norm: float
    error: float
    next_sigma: float
    facts: Mapping[str, float] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """Plain data."""
        return {**{k: v for k, v in vars(self).items() if k != "facts"}, **self.facts}


@dataclass(frozen=True)
class Merged:
    """The merged adapter, its layers' reports, and the config of the method."""

    adapter: Adapter
    layers: tuple[LayerReport, ...]
    config: Any

    @property
    def error(self) -> float:
        """‖ΔW − ΔW'‖ / ‖ΔW‖ over all layers together."""
        whole = math.fsum(layer.norm**2 for layer in self.layers)
        lost = math.fsum((layer.error * layer.norm) ** 2 for layer in self.layers)
        return math.sqrt(lost / whole) if whole else 0.0

    @property
    def worst(self) -> LayerReport | None:
        """The layer with the largest error; None where there are no layers (prompts, bottlenecks)."""
        return max(self.layers, key=lambda layer: layer.error, default=None)


def merge(
    experts: Mapping[str, Adapter],
    config: Any,
    *,
    rank: int | str = "auto",
    dtype: str = "float32",
    backbone: nn.Module | None = None,
    device: str | torch.device = "cpu",
    told: Callable[[LayerReport], None] = lambda report: None,
) -> Merged:
    """The experts as one, by the method that `config.name` names; they are not changed.

    `rank` of the result: see `products.fit`. `dtype` of its tensors; all arithmetic is float64 on `device`. `backbone`
    is needed for DoRA, and for heads and biases whose weights do not add up to 1. `told` hears of each layer.

    Raises ValueError for experts that cannot be merged, naming them and the reason, and for settings that do not fit.
    """
    method = MERGES.build(config, tuple(experts))
    return merged_by(method, experts, rank=rank, dtype=dtype, backbone=backbone, device=device, told=told)


def merged_by(
    method: Merge,
    experts: Mapping[str, Adapter],
    *,
    rank: int | str = "auto",
    dtype: str = "float32",
    backbone: nn.Module | None = None,
    device: str | torch.device = "cpu",
    told: Callable[[LayerReport], None] = lambda report: None,
) -> Merged:
    """As `merge`, by a method that is built already."""
    check_rank(rank)
    if method.keeps_rank and rank not in ("auto", "exact"):
        raise ValueError(f"rank={rank}: method={method.config.name} keeps every rank; use method=linear for another")
    if dtype not in DTYPES:
        raise ValueError(unknown("dtype", dtype, DTYPES))
    kind = _kind(experts)
    modules: dict[str, Any] = {}
    reports: list[LayerReport] = []
    if kind == "parameters":
        _check_average(method, rank, experts)
        modules = averaged(experts, method.shares, DTYPES[dtype])
    else:
        method.survey(lambda: layers_of(experts, backbone, device))
        made = _Made(DTYPES[dtype], experts)
        for layer in layers_of(experts, backbone, device):
            if layer.part and not method.vectors:
                raise ValueError(
                    f"{layer.path}: method={method.config.name} merges matrices, and the experts have vectors there "
                    f"({layer.part}): use linear, task_arithmetic, ties, dare or slerp"
                )
            if report := made.take(layer, method, rank):
                reports.append(report)
                told(report)
        modules = made.modules()
    return Merged(_adapter(experts, modules, method, backbone, DTYPES[dtype]), tuple(reports), method.config)


class _Made:
    """The merged modules so far."""

    def __init__(self, dtype: torch.dtype, experts: Mapping[str, Adapter]):
        self.dtype, self.experts = dtype, experts
        self.factors: dict[str, tuple[Form, LowRank]] = {}
        self.vectors: dict[str, Tensor] = {}

    def take(self, layer: Layer, method: Merge, rank: int | str) -> LayerReport | None:
        """Merges a layer. Returns the report of a matrix."""
        product = method.merge(layer)
        if layer.part:
            self.vectors[layer.path] = _matrix(product).flatten()
            return None
        fitted = fit(product, rank, layer.ranks)
        if fitted.product.rank > MAX_RANK:
            raise ValueError(
                f"{layer.path}: the result has rank {fitted.product.rank:,}, and adapters hold {MAX_RANK:,} at most: "
                "give a rank, such as rank=64 or rank=energy:0.99"
            )
        self.factors[layer.path] = layer.form, fitted.product
        facts = method.facts(layer)
        return LayerReport(layer.path, fitted.product.rank, fitted.norm, fitted.error, fitted.next_sigma, facts)

    def modules(self) -> dict[str, Any]:
        """Path → weights. PEFT has biases (lora_bias) at all modules or at none, so that some are zero."""
        biased = bool(self.factors) and bool(self.vectors)
        found: dict[str, Any] = {}
        for path, (form, product) in self.factors.items():
            bias = self.vectors.get(path, product.B.new_zeros(product.B.shape[0])) if biased else None
            found[path] = form.weights(product, bias, self.dtype)
        for path, vector in self.vectors.items() if not self.factors else ():
            like = next(a.modules[path] for a in self.experts.values() if path in a.modules)
            found[path] = dataclasses.replace(like, factors=(1 + vector).to("cpu", self.dtype))
        return found


def _matrix(product: Product) -> Tensor:
    return product.matrix if isinstance(product, Dense) else product.B @ product.A


def _kind(experts: Mapping[str, Adapter]) -> str:
    """lora, ia3, or parameters for all else. Raises ValueError for experts of unlike kinds."""
    kinds: dict[str, str] = {}
    for name, adapter in experts.items():
        for path, weights in adapter.modules.items():
            kinds.setdefault("lora" if isinstance(weights, LoraWeights) else adapter.method, f"{name!r} at {path}")
    if len(kinds) > 1:
        told = "; ".join(f"{kind}: {where}" for kind, where in kinds.items())
        raise ValueError(
            f"experts of unlike kinds cannot become one ({told}): merge those of one kind, or build a "
            "mixture of them (mole build-moe)"
        )
    (kind,) = kinds or ("lora",)
    return kind if kind in ("lora", "ia3") else "parameters"


def _check_average(method: Merge, rank: int | str, experts: Mapping[str, Adapter]) -> None:
    if method.config.name != "linear":
        raise ValueError(
            f"method={method.config.name} merges what is added to a matrix (LoRA, DoRA, IA3); of these experts only "
            "the parameters can be averaged: use method=linear"
        )
    own = {part.rank for adapter in experts.values() for part in adapter.modules.values()}
    if rank not in ("auto", "exact", *own):
        raise ValueError(f"rank={rank}: parameters are averaged in the shapes that they have: leave it at auto")


def _adapter(
    experts: Mapping[str, Adapter],
    modules: dict[str, Any],
    method: Merge,
    backbone: nn.Module | None,
    dtype: torch.dtype,
) -> Adapter:
    """The merged modules, with what the experts hold of the backbone itself and what they say of themselves."""
    adapters = list(experts.values())
    heads = merged_modules(experts, method.shares, backbone, dtype)
    biases = merged_biases(experts, method.shares, backbone, dtype)
    kinds = {adapter.bias_kind for adapter in adapters if adapter.biases}
    tasks = {adapter.task_type for adapter in adapters if adapter.task_type is not None}
    if len(tasks) > 1:
        raise ValueError(f"the experts were trained under unlike heads ({', '.join(sorted(tasks))})")
    known = all(adapter.targets for adapter in adapters)
    return Adapter(
        method=adapters[0].method,
        modules=modules,
        targets=tuple(sorted({target for adapter in adapters for target in adapter.targets})) if known else (),
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in adapters),
        task_type=min(tasks) if tasks else None,
        biases=biases,
        bias_kind=("all" if len(kinds) > 1 else min(kinds)) if biases else "none",
        full_modules=heads,
        full_names=tuple(dict.fromkeys(name for adapter in adapters for name in adapter.full_names)),
        base_weights=common_base_weights(experts),
    )
