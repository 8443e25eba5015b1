"""Put mixture layers into a backbone: the bank of each module, for whatever kinds of experts adapt it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mole.adapters import Adapter, BottleneckWeights, LoraWeights, NormWeights, PromptWeights, symbolic
from mole.adapters.bottleneck import POST_NORM, is_output
from mole.backbones.modules import compute_dtype_of, device_of, kind_of, replace_module
from mole.backbones.sites import split_sites
from mole.mixtures.adapter_mixture import MixtureLayer
from mole.mixtures.banks import (
    BankOfBanks,
    BottleneckBank,
    ConvolutionBank,
    DoraBank,
    EmbeddingBank,
    LoraBank,
    ModuleBank,
    OffsetBank,
    OutputBank,
)
from mole.mixtures.banks.branches import Branches, Member
from mole.mixtures.banks.lora import EXPERT_DROPOUT, EXPERT_DTYPES
from mole.mixtures.call_mixture import mixture_at
from mole.mixtures.checking import check, check_closing, closed_twice
from mole.mixtures.fitting import POOLED_GATES, Fit, pooling
from mole.mixtures.full_modules import StandIn, check_policy, stand_ins
from mole.mixtures.names import renamed
from mole.mixtures.other_kinds import other_banks
from mole.mixtures.output_mixture import OutputMixture, SplitMixture
from mole.registry import unknown
from mole.routing import RoutingContext


@dataclass(frozen=True)
class MixtureOptions:
    """How a mixture computes. Raises ValueError for an unknown value.

    `expert_dropout`, `expert_dtype` see LoraBank; `modules_to_save` see full_modules; `pooled_gate` the gates of a
    module that sees one vector per example: first, last (token) or mean, auto by the backbone; `gate_lora_bias` false
    adds the biases of lora_bias experts whatever the gates, in the routing pass too, as PEFT's X-LoRA does (but without
    its global weight); `scaling_pass_dropout` leaves the backbone's dropout on in the routing pass; `heads` are the
    paths of the backbone's heads, which modules_to_save=train is about.
    """

    kernel: str = "auto"
    expert_dropout: str = "auto"
    expert_dtype: str = "auto"
    modules_to_save: str = "error"
    pooled_gate: str = "auto"
    gate_lora_bias: bool = True
    scaling_pass_dropout: bool = False
    heads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = {"expert_dropout": EXPERT_DROPOUT, "expert_dtype": tuple(EXPERT_DTYPES), "pooled_gate": POOLED_GATES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(unknown(name, getattr(self, name), list(values)))

    def as_saved(self) -> dict[str, Any]:
        """What is not the default, but for the kernel, which changes no result."""
        rows = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        return {name: value for name, value in rows.items() if name != "kernel"}


@dataclass(frozen=True)
class Wrapped:
    """What stands in the backbone now, path → module: the mixtures in the order of `named_modules()`, and stand-ins.

    `outlines` name → the expert under the backbone's names, without what the mixtures hold of it.
    """

    layers: dict[str, MixtureLayer]
    stand_ins: dict[str, StandIn]
    outlines: dict[str, Adapter]


def wrap(
    backbone: PreTrainedModel, experts: Mapping[str, Adapter], context: RoutingContext, options: MixtureOptions
) -> Wrapped:
    """A mixture at every module that some expert changes.

    Raises ValueError, before anything is replaced, if an expert names a module that the backbone lacks, one of another
    shape, or one that cannot be mixed.
    """
    experts = {name: renamed(name, adapter, backbone) for name, adapter in experts.items()}
    modules = dict(backbone.named_modules())
    check_policy(options.modules_to_save, experts)
    check(backbone, experts, modules)
    sites = _Sites(backbone, list(experts.values()), modules, options)
    layers = {
        path: mixture_at(modules[path], sites.bank(path), sites.fit(path), context, sites.closed.get(path))
        for path in sites.paths
    }
    standing = stand_ins(modules, experts, options.modules_to_save, context, options.heads)
    check_closing(layers, standing)
    for path, layer in layers.items():
        layer.weighs_base = not any(_ends(layers[inner]) for inner in layers if inner.startswith(f"{path}."))
    for path, layer in reversed({**layers, **standing}.items()):  # parts of a module before the module
        replace_module(backbone, path, layer)
    for layer in layers.values():
        if isinstance(layer, SplitMixture):
            layer.join(backbone)
    outlines = {name: replace(adapter, modules={}) for name, adapter in experts.items()}
    return Wrapped(layers, standing, outlines)


def unwrap(backbone: nn.Module, wrapped: Mapping[str, Any]) -> None:
    """Puts the modules back that layers and stand-ins, path → module, were wrapped around."""
    for path, layer in wrapped.items():
        if isinstance(layer, SplitMixture):
            layer.part()
        replace_module(backbone, path, layer.base)


def _ends(layer: MixtureLayer) -> bool:
    """Whether bottlenecks end a sub-layer there."""
    return any(isinstance(bank, BottleneckBank) for bank in getattr(layer.bank, "banks", [layer.bank]))


def without_norms(experts: Mapping[str, Adapter], router_config: Any) -> Mapping[str, Adapter]:
    """The experts as a router takes them that mixes before the backbone's norm: without norms of their own.

    Raises ValueError where some have norms, unless the config says norms=base. Other routers take them as they are.
    """
    if not hasattr(router_config, "norms"):
        return experts
    found = {}
    for name, adapter in experts.items():
        kept = {path: part for path, part in adapter.modules.items() if not isinstance(part, NormWeights)}
        if len(kept) < len(adapter.modules) and router_config.norms == "refuse":
            raise ValueError(
                f"expert {name!r} trained norms along, and router={router_config.name} mixes before the backbone's: "
                "router.norms=base leaves them out, at the cost of what they do; or train experts with "
                "adapter.train_norms=none"
            )
        found[name] = replace(adapter, modules=kept)
    return found


def has_lora_bias(adapter: Adapter) -> bool:
    """Whether some LoRA of the expert has a bias."""
    return any(isinstance(part, LoraWeights) and part.bias is not None for part in adapter.modules.values())


def expert_now(outline: Adapter, index: int, layers: Mapping[str, MixtureLayer]) -> Adapter:
    """The expert of that mixture index as the layers hold it now; tensors are views of theirs."""
    biases, full = dict(outline.biases), dict(outline.full_modules)
    for site, layer in layers.items():
        if isinstance(layer.bank, LoraBank):
            continue
        if (bias := layer.bank.base_bias(index)) is not None:
            biases[site] = bias
        if (module := layer.bank.full_module(index)) is not None:
            full[site] = module
    modules, norms = {}, {}
    for site, layer in layers.items():
        closes = isinstance(layer, OutputMixture)
        if (part := layer.bank.weights(index)) is not None:
            modules[layer.bottleneck_path if closes else site] = part
        if closes and (norm := layer.bank.norm_of(index)) is not None:
            norms[layer.norm_path] = norm
    modules |= norms
    return symbolic(replace(outline, modules=modules, biases=biases, full_modules=full))


class _Sites:
    """The modules that experts change, and what each of them needs."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        experts: list[Adapter],
        modules: Mapping[str, nn.Module],
        options: MixtureOptions,
    ):
        self.experts = experts
        self.modules = modules
        self.options = options
        self.backbone = backbone
        self.width = backbone.config.get_text_config().hidden_size
        self.head = getattr(backbone, "get_output_embeddings", lambda: None)()
        self.pooled = pooling(backbone, options.pooled_gate)
        self.biases = [_changed_biases(adapter, modules) for adapter in experts]
        mixes = options.modules_to_save == "mix"
        self.full = [adapter.full_modules if mixes else {} for adapter in experts]
        self.splits = {site.path: site for site in split_sites(backbone)}
        wanted = {self._site(path, part) for adapter in experts for path, part in adapter.modules.items()}
        self.closed = {site.norm: site for site in self.splits.values() if site.norm in wanted}
        wanted |= {path for parts in [*self.biases, *self.full] for path in parts}
        self.paths = [path for path in modules if path in wanted]

    def _site(self, path: str, weights: Any) -> str:
        """Where a part of an expert is mixed: an output module's norm with it, parts of a split site at its norm."""
        if isinstance(weights, BottleneckWeights) and weights.reads in POST_NORM and path in self.splits:
            return str(self.splits[path].norm)
        outer = path.rpartition(".")[0]
        if isinstance(weights, NormWeights) and path.endswith(".LayerNorm") and is_output(self.modules[outer]):
            return outer
        return path

    def fit(self, path: str) -> Fit:
        """How the rows of the module at `path` find their gates."""
        module = self.modules[path]
        takes = {"embedding": "ids", "convolution": "channels"}.get(kind_of(module) or "", "features")
        if any(path in parts for parts in self.full):
            takes = "outputs"
        parts = [adapter.modules[path] for adapter in self.experts if path in adapter.modules]
        if any(isinstance(part, PromptWeights) for part in parts):
            takes = "sequence"
        return Fit(
            site=path,
            num_experts=len(self.experts),
            takes=takes,
            pooled=self.pooled,
            pointwise=isinstance(module, nn.Conv1d) and (*module.kernel_size, *module.stride) == (1, 1),
            is_head=module is self.head,
            widths=None if kind_of(module) else (self.width, self.width),
        )

    def bank(self, path: str) -> nn.Module:
        """The experts at `path`, on the device of its module."""
        module, count = self.modules[path], len(self.experts)
        if path in self.closed and any(path in parts for parts in [*self.biases, *self.full]):
            raise closed_twice(path, path)
        if full := {i: parts[path] for i, parts in enumerate(self.full) if path in parts}:
            if kind_of(module) == "convolution" or any(path in parts for parts in self.biases):
                raise ValueError(f"modules_to_save=mix: {path}: convolutions, and modules with biases, cannot be mixed")
            return _at(path, lambda: ModuleBank(full, count, base=module)).to(device_of(module))
        branches = is_output(module) or path in self.closed
        banks = [self._branches(path)] if branches else self._banks(path, module)
        for bank in banks:
            if not isinstance(bank, LoraBank | Branches):  # which see to it themselves
                bank.own_dtype = EXPERT_DTYPES[self.options.expert_dtype]
        bank = banks[0] if len(banks) == 1 else BankOfBanks(banks)
        return bank.to(device_of(module))

    def _branches(self, path: str) -> OutputBank:
        """The experts' branches at an output module, or at the norm of a split site."""
        dtype = torch.promote_types(compute_dtype_of(self.modules[path]), torch.float32)
        drops = self.options.expert_dropout != "off"
        members, split = {}, self.closed.get(path)
        names = (path, f"{path}.LayerNorm") if split is None else (split.path, path)
        for index, adapter in enumerate(self.experts):
            small, norm = (adapter.modules.get(name) for name in names)
            small = small if self._site(names[0], small) == path else None  # a LoRA may be at a last linear map
            if small is not None or norm is not None:
                members[index] = Member(small, norm, dtype, adapter.dropout if drops else 0.0)
        return OutputBank(members, len(self.experts))

    def _banks(self, path: str, module: nn.Module) -> list:
        options, count, kind = self.options, len(self.experts), kind_of(module)
        found = {i: a.modules[path] for i, a in enumerate(self.experts) if path in a.modules}
        every = {i: weights for i, weights in found.items() if self._site(path, weights) == path}
        here = {i: weights for i, weights in every.items() if isinstance(weights, LoraWeights)}
        dtype = EXPERT_DTYPES[options.expert_dtype] or compute_dtype_of(module)
        drops = {"dropout": {i: self.experts[i].dropout for i in every}, "expert_dropout": options.expert_dropout}
        others = {i: weights for i, weights in every.items() if i not in here}
        banks: list = other_banks(others, count, path, module, self.backbone, dtype=dtype, **drops)
        if here and kind == "embedding":
            banks.append(EmbeddingBank(here, count, base=module, dtype=dtype))
        elif here and kind == "convolution":
            banks.append(ConvolutionBank(here, count, base=module, dtype=dtype))
        elif here:
            banks += self._linear(here, module)
        added = {i: weights.bias for i, weights in here.items() if weights.bias is not None}
        first = kind == "convolution"
        if added:
            scales = {i: here[i].scale for i in added}
            gated = options.gate_lora_bias
            banks.append(OffsetBank(added, count, dtype=dtype, scales=scales, channels_first=first, gated=gated))
        trained = {i: parts[path] for i, parts in enumerate(self.biases) if path in parts}
        if trained:
            base = getattr(module, "bias", None)
            banks.append(OffsetBank(trained, count, dtype=dtype, base_bias=base, channels_first=first))
        return banks

    def _linear(self, here: Mapping[int, LoraWeights], module: nn.Module) -> list[LoraBank]:
        """DoRA's experts first: they go by what the module itself gave."""
        options = self.options
        settings = {
            "dtype": compute_dtype_of(module),
            "kernel": options.kernel,
            "dropout": {i: self.experts[i].dropout for i in here},
            "expert_dropout": options.expert_dropout,
            "expert_dtype": options.expert_dtype,
        }
        dora = {i: weights for i, weights in here.items() if weights.magnitude is not None}
        plain = {i: weights for i, weights in here.items() if i not in dora}
        banks: list[LoraBank] = [DoraBank(dora, len(self.experts), base=module, **settings)] if dora else []
        return [*banks, LoraBank(plain, len(self.experts), **settings)] if plain else banks


def _at(path: str, build):
    try:
        return build()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _changed_biases(adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The biases that the expert changed: those that it left as they were need no mixture.

    Raises ValueError for a bias whose module does not simply add it. One that is tied to another's is that one's.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    adding = (nn.Linear, Conv1D, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    ordered = sorted(adapter.biases.items(), key=lambda row: not isinstance(modules[row[0]], adding))
    for path, bias in ordered:
        here = getattr(modules[path], "bias", None)
        if not isinstance(here, Tensor) or here.shape != bias.shape:
            raise ValueError(f"{path}: a trained bias of shape {tuple(bias.shape)}, and the module has none like it")
        if id(here) in seen or torch.equal(bias.to(here.device, here.dtype), here.detach()):
            continue
        seen.add(id(here))
        if not isinstance(modules[path], adding) and kind_of(modules[path]) is None:
            raise ValueError(f"{path}: a {type(modules[path]).__name__} does more with its bias than add it")
        found[path] = bias
    return found
