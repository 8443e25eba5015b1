"""Surgery on a finished model: the modules that a pattern names become mixtures of experts, and back."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mole.backbones.modules import device_of, reads_left_to_right, replace_module
from mole.moe.block import MoEBlock
from mole.moe.config import MoEConfig
from mole.moe.experts import upcycled
from mole.moe.flat import changed, from_flat
from mole.moe.forwards import RootForward
from mole.moe.report import SurgeryReport, WrappedRow
from mole.moe.targets import Pattern, Target, check_calls, find_targets, told, width_of
from mole.moe.upcycling import fresh, of_models

RECORD = "moe_surgery"


@dataclass
class Wrapped:
    """One block and what stood in its place. `original` is None where expert 0 is that very module."""

    names: tuple[str, ...]
    block: MoEBlock
    input_dim: int
    digest: str
    original: nn.Module | None = None

    def untouched(self) -> nn.Module | None:
        """The module as it was before the surgery; None if it has been trained since."""
        if self.original is not None:
            first = next(self.block.experts[0].parameters(), None)
            return self.original if first is None else self.original.to(first.device)
        expert = self.block.experts[0]
        return expert if digest(expert) == self.digest else None


@dataclass
class Surgery:
    """What was done to a model, kept on its root as a plain object: no part of its state."""

    root: RootForward
    patterns: list[str] = field(default_factory=list)
    wrapped: list[Wrapped] = field(default_factory=list)


def moefy(
    model: nn.Module,
    pattern: Pattern,
    *,
    num_experts: int | None = None,
    init: str | Sequence[nn.Module] = "copy",
    init_noise: float = 0.01,
    seed: int = 0,
    input_dim: int | None = None,
    config: MoEConfig | None = None,
    keep_original: bool = False,
    **options: Any,
) -> SurgeryReport:
    """Puts a block of experts in the place of every module that `pattern` names, in place; says what it did.

    `pattern`: a regular expression for the whole name, several of them, or a predicate (name, module). `init`: `copy`
    (expert 0 is the module itself, the others are copies with w + init_noise·std(w)·N(0, 1)), `fresh` (all start
    anew), or other models, whose modules of the same names become the experts beside it. `num_experts` is needed but
    for the last. `config`, or `options` (k, noise, hole … as of MoEBlock, and every field of MoEConfig and its router
    by its name; `aggregation` is `mean` here), says how the blocks route. `seed` starts the noise and the routers.
    `keep_original` sets the modules themselves aside, for `unmoefy` after training.

    Raises ValueError, with nothing changed, for a pattern that matches nothing or blocks inside blocks, a module that
    does not take one tensor and give one, and for settings that do not fit.
    """
    targets = find_targets(model, pattern, MoEBlock)
    shared = options.get("shared_experts", 0) if config is None else config.shared_experts
    count = _count(num_experts, init, config, shared if isinstance(shared, int) else 0)
    config = _settings(config, options, count, causal=reads_left_to_right(model))
    made: list[Wrapped] = []
    for index, target in enumerate(targets):
        width = input_dim or width_of(target)
        check_calls(target, width, config.route == "images")
        every = count + config.shared_experts
        experts, original = _experts(target, every, init, init_noise, seed + index, keep_original)
        made.append(_wrapped(target, experts, width, replace(config, layer_id=target.name), seed + index))
        made[-1].original = original
    _put(model, made, [told(pattern)])
    return SurgeryReport(tuple(_row(wrapped) for wrapped in made), _changes(config, init, init_noise))


def apply_surgery(
    model: nn.Module, places: Sequence[tuple[tuple[str, ...], int, MoEConfig]], patterns: Sequence[str]
) -> Surgery:
    """Makes blocks at `places` (names, width, configuration with the number of experts) out of copies of what is there.

    Raises ValueError, with nothing changed, where a block is already, or the names are not of one module.
    """
    made = []
    for names, width, config in places:
        modules = {id(model.get_submodule(name)): model.get_submodule(name) for name in names}
        (module,) = modules.values() if len(modules) == 1 else (None,)
        if module is None or any(isinstance(part, MoEBlock) for part in module.modules()):
            raise ValueError(f"{', '.join(names)}: wanted one module that is no mixture of experts yet")
        experts = upcycled(module, (config.num_experts or 1) + config.shared_experts)
        made.append(_wrapped(Target(names, module), experts, width, config, seed=0))
    return _put(model, made, patterns)


def _wrapped(target: Target, experts: list[nn.Module], width: int, config: MoEConfig, seed: int) -> Wrapped:
    """The block that is to stand for the target."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = MoEBlock(experts=experts, input_dim=width, config=config)
    block.train(target.module.training)
    block.to(device_of(target.module))
    return Wrapped(target.names, block, width, digest(target.module))


def _put(model: nn.Module, made: Sequence[Wrapped], patterns: Sequence[str]) -> Surgery:
    """Sets the blocks in, with the context of the model."""
    record: Surgery | None = getattr(model, RECORD, None)
    if record is None:
        record = Surgery(RootForward(model))
        setattr(model, RECORD, record)
    for wrapped in made:
        wrapped.block.context = record.root.context
        for name in wrapped.names:
            replace_module(model, name, wrapped.block)
    record.patterns += patterns
    record.wrapped += made
    return record


def unmoefy(model: nn.Module, keep: str | int = "original") -> None:
    """Puts plain modules back in the place of all blocks that `moefy` made.

    `keep`: `original` (the modules as they were, bit for bit), the number of an expert, or `mean` (of all experts'
    parameters). Raises ValueError, with nothing changed, if the model has no such blocks, the original was trained
    and not kept, or there is no such expert.
    """
    record = surgery_of(model)
    back = [_kept(wrapped, keep) for wrapped in record.wrapped]
    for wrapped, module in zip(record.wrapped, back, strict=True):
        for name in wrapped.names:
            replace_module(model, name, module.train(wrapped.block.training))
    record.root.remove()
    delattr(model, RECORD)


def surgery_of(model: nn.Module) -> Surgery:
    """What was done to `model`. Raises ValueError if nothing was."""
    record = getattr(model, RECORD, None)
    if record is None:
        raise ValueError(f"this {type(model).__name__} has no blocks that moefy made: moefy(model, pattern) first")
    return record


def blocks_of(model: nn.Module) -> dict[str, MoEBlock]:
    """Every block in `model`, made by surgery or not, by its first name; "" is the model itself, if it is one."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoEBlock)}


# ---- the parts
def _count(num_experts: int | None, init: str | Sequence[nn.Module], config: MoEConfig | None, shared: int) -> int:
    """How many experts are chosen from; of other models' modules `shared` are set aside."""
    if not isinstance(init, str):
        count = len(init) + 1 - shared
        if num_experts not in (None, count):
            raise ValueError(f"init: {len(init)} models beside this make {count} experts, not {num_experts}")
        return count
    if init not in ("copy", "fresh"):
        raise ValueError(f"init={init!r}: known are copy, fresh, or a list of models")
    said = config.num_experts if config is not None else None
    if num_experts is not None and said is not None and num_experts != said:
        raise ValueError(f"num_experts={num_experts} here and {said} in config: give one of them")
    count = num_experts or said
    if count is None:
        raise ValueError("num_experts is missing: how many experts shall each module become?")
    return count


def _settings(config: MoEConfig | None, options: dict[str, Any], count: int, *, causal: bool) -> MoEConfig:
    """The configuration of every block, but for its label."""
    if config is not None and options:
        raise ValueError(f"config and {', '.join(sorted(options))} are both given: put all of it into config")
    if config is None:
        config = from_flat({"aggregation": "mean", **options}, count)
    return changed(config, num_experts=count, causal=config.causal or causal)


def _experts(
    target: Target, count: int, init: str | Sequence[nn.Module], noise: float, seed: int, keep: bool
) -> tuple[list[nn.Module], nn.Module | None]:
    """The experts, and the module itself where it is none of them."""
    module = copy.deepcopy(target.module) if keep else target.module
    aside = target.module if keep else None
    if not isinstance(init, str):
        return of_models(module, target.name, init), aside
    if init == "fresh":
        return fresh(target.module, count, seed=seed), target.module
    return upcycled(module, count, noise, seed), aside


def _kept(wrapped: Wrapped, keep: str | int) -> nn.Module:
    experts, name = wrapped.block.experts, wrapped.names[0]
    if keep == "original":
        module = wrapped.untouched()
        if module is None:
            raise ValueError(
                f"{name}: its original was trained as expert 0: keep=0, another expert or keep='mean'; "
                "keep_original=True at the surgery sets it aside"
            )
        return module
    if keep == "mean":
        return _mean(list(experts))
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep < len(experts):
        raise ValueError(f"keep={keep!r}: known are original, mean, and the experts 0 … {len(experts) - 1} of {name}")
    return experts[keep]


@torch.no_grad()
def _mean(experts: Sequence[nn.Module]) -> nn.Module:
    found = copy.deepcopy(experts[0])
    states = [expert.state_dict() for expert in experts]
    for name, tensor in found.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.stack([state[name].double() for state in states]).mean(0))
    return found


def _row(wrapped: Wrapped) -> WrappedRow:
    block, count = wrapped.block, len(wrapped.block.experts)
    sizes = [sum(p.numel() for p in expert.parameters()) for expert in block.experts]
    after = sum(p.numel() for p in block.parameters())
    k = min(block.config.k or count, count)
    active = after - sum(sizes) + round(sum(sizes) / count * k)
    return WrappedRow(wrapped.names, count, sizes[0], after, active)


def _changes(config: MoEConfig, init: str | Sequence[nn.Module], noise: float) -> tuple[str, ...]:
    """Why the model does not compute what it did: nothing, if k equal experts share weights that sum to 1."""
    router = config.router
    plain = router.name in ("top_k", "hash", "round_robin")
    reasons = {
        "the experts are other models'": not isinstance(init, str),
        "init=fresh": init == "fresh",
        f"init_noise={noise}": init == "copy" and noise > 0,
        f"router={router.name}": not plain,
        "gates are not normalised (aggregation=mean or router.norm_topk)": plain
        and config.aggregation != "mean"
        and not router.norm_topk,
        f"router.route_scale={router.route_scale}": router.route_scale != 1.0,
        "capacity.factor may drop tokens": config.capacity.factor is not None,
        "null experts do no work": bool(config.null_experts),
        "shared experts are added": config.shared_experts > 0,
    }
    return tuple(reason for reason, holds in reasons.items() if holds)


def digest(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of a module's parameters and buffers."""
    return digest_of([*module.named_parameters(), *module.named_buffers()])


@torch.no_grad()
def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
