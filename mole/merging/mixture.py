"""A mixture → one expert, where that is exact: weights that are the same for every token of every input.

With combine=outputs the expert is Σ w_e ΔW_e, by concatenation; with combine=parameters (Σ w_e s_e B_e)(Σ w_e A_e).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mole.adapters import Adapter, LoraWeights
from mole.merging.deltas import Layer
from mole.merging.linear import Linear, LinearConfig
from mole.merging.merge import LayerReport, Merged, merged_by
from mole.routers import Router


class ByModule(Linear):
    """Linear merging with weights of their own for every module: path → weight of each expert, in order."""

    def __init__(self, config: LinearConfig, names: Sequence[str], weights: Mapping[str, Sequence[float]]):
        super().__init__(config, names)
        self._by_path = {path: dict(zip(self.names, row, strict=True)) for path, row in weights.items()}

    def coefficients(self, layer: Layer) -> dict[str, float]:
        return self.shares(list(layer.deltas), layer.path)

    def shares(self, names: Sequence[str], path: str) -> dict[str, float]:
        # A bias that no expert changed is no mixed module: there any weights give the backbone's own.
        self.weights = self._by_path.get(path, dict.fromkeys(self.names, 0.0))
        return super().shares(names, path)


def static_weights(routers: Mapping[str, Router]) -> dict[str, Tensor]:
    """Path of a mixed module → weights [E] that every token gets there.

    Raises ValueError, with the router's reason, where they depend on the input or differ between blocks of features.
    """
    found: dict[str, Tensor] = {}
    for router in routers.values():
        weights = router.mergeable()
        rows = weights if isinstance(weights, tuple) else (weights,) * len(router.sites)
        for site, row in zip(router.sites, rows, strict=True):
            if row.dim() != 1:
                raise ValueError(
                    f"router={router.config.name} has weights for blocks of features: no single expert does the same"
                )
            found[site] = row.detach().double().cpu()
    return found


def one_expert(
    experts: Mapping[str, Adapter],
    routers: Mapping[str, Router],
    *,
    rank: int | str = "auto",
    dtype: str = "float32",
    backbone: nn.Module | None = None,
    gate_lora_bias: bool = True,
    device: str | torch.device = "cpu",
    told: Callable[[LayerReport], None] = lambda report: None,
) -> Merged:
    """The mixture of `experts` (in its order) under `routers` as one adapter; `rank` … `told` as for `merge`.

    Experts that have no weight anywhere are left out. `backbone` without the mixture's layers. Raises ValueError where
    no single expert does the same: weights that depend on the input, experts that are not linear in what they hold.
    """
    weights = static_weights(routers)
    config = next(iter(routers.values())).config
    table = torch.stack(list(weights.values()))
    used = [index for index, _ in enumerate(experts) if bool((table[:, index] != 0).any())]
    if not used:
        raise ValueError("every weight of this mixture is 0: it is the plain backbone, and there is nothing to merge")
    names = [name for index, name in enumerate(experts) if index in used]
    kept = {name: experts[name] for name in names}
    by_path = {path: row[used].tolist() for path, row in weights.items()}
    parameters = getattr(config, "combine", "outputs") == "parameters"
    alone = len(kept) == 1 and all(row == [1.0] for row in by_path.values())
    _check(kept, alone, parameters, gate_lora_bias)
    if alone:  # norms, and bottlenecks of split sites, are mixed at a site of another name
        by_path |= {path: [1.0] for path in kept[names[0]].modules}
    settings = LinearConfig(
        space="factors" if parameters else "delta",
        missing="mean_present" if getattr(config, "missing", "drop") == "renormalise" else "zero",
    )
    method = ByModule(settings, names, by_path)
    return merged_by(method, kept, rank=rank, dtype=dtype, backbone=backbone, device=device, told=told)


def with_modules(merged: Merged, modules: Mapping[str, nn.Module]) -> Merged:
    """The same with whole modules that stand beside the routing (path → module), copied to the CPU."""
    states = {path: {n: t.detach().cpu().clone() for n, t in m.state_dict().items()} for path, m in modules.items()}
    names = tuple(dict.fromkeys(path.rsplit(".", 1)[-1] for path in states))
    return replace(merged, adapter=replace(merged.adapter, full_modules=states, full_names=names))


def _check(experts: Mapping[str, Adapter], alone: bool, parameters: bool, gate_lora_bias: bool) -> None:
    """Raises ValueError for what no linear merge does exactly; `alone` one expert has all the weight everywhere."""
    for name, adapter in experts.items():
        for path, part in adapter.modules.items():
            linear = isinstance(part, LoraWeights) or adapter.method == "ia3"
            if not linear and not (alone or (parameters and adapter.method == "bottleneck")):
                raise ValueError(
                    f"expert {name!r} at {path}: what {adapter.method} adds is not linear in its weights, so that no "
                    "single expert does what this mixture does"
                )
            if getattr(part, "bias", None) is not None and not gate_lora_bias:
                raise ValueError(
                    f"expert {name!r} at {path}: its bias is added whatever the weights (gate_lora_bias=false): build "
                    "the mixture with gated biases"
                )
            if parameters and not alone and getattr(part, "magnitude", None) is not None:
                raise ValueError(f"expert {name!r} at {path}: DoRA has no combination of parameters")
