"""`mole merge`: experts of a library → one, by any method; or a mixture → one expert, where that is exact."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from mole import backbones, merging, mixtures
from mole.backbones import Backbone
from mole.commands.library.opening import library_of, open_library
from mole.config.nodes import RunConfig, not_chosen
from mole.experts import BackboneRef, Expert, ExpertLibrary, LibraryError, check_backbone, check_name, describe
from mole.experts.card import Card
from mole.experts.damage import sound_cards
from mole.experts.folder import read_card
from mole.merging import Merged
from mole.merging.card import check_same_backbone, chosen, common_facts, method_facts
from mole.merging.products import check_rank
from mole.mixtures import MultiExpertModel
from mole.registry import BACKBONES, LIBRARIES, MERGES, config_dataclass
from mole.routers import UniformConfig
from mole.run_folder import RunFolder, write_atomically

ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SHOWN = 8


@config_dataclass
class Merge:
    """Experts of a library and a method, or a mixture; and what becomes of the result."""

    library: LIBRARIES.union() | None = None  # type: ignore[valid-type]
    method: MERGES.union() | None = None  # type: ignore[valid-type]
    backbone: BACKBONES.union() | None = None  # type: ignore[valid-type]
    experts: tuple[str, ...] | None = None
    mixture: str | None = None
    name: str = "merged"
    rank: int | str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    into: str | None = None
    publish: bool = True
    tags: tuple[str, ...] = ()
    license: str | None = None
    description: str = ""
    allow_other_backbone: bool = False
    seed: int = 0
    run: RunConfig

    def __post_init__(self):
        check_name(self.name)
        check_rank(self.rank)
        problems = []
        if self.mixture is None:
            if self.library is None:
                problems.append("library: not chosen; where are the experts? library=<folder>")
            if self.method is None:
                problems.append(not_chosen("method", MERGES.names()))
        else:
            if self.method is not None:
                problems.append(
                    "method and mixture: a mixture's own weights say how its experts become one: leave out method"
                )
            if self.experts is not None:
                problems.append("experts and mixture: all experts of a mixture become one: leave out experts")
            if self.backbone is None:
                problems.append("mixture needs the backbone that it was built on: backbone=<one>")
        if self.into is not None and not self.publish:
            problems.append(
                "into and publish=false: into names the library that takes the result: leave out one of them"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def target(self) -> str | None:
        """The address of the library that takes the result; None: it stays in the run's folder."""
        own = self.library.url if self.library is not None else None
        return (self.into or own) if self.publish else None


def run(config: Merge) -> float:
    """Merges, keeps the result as `expert/` with merge.json beside it, adds it to the library if one is named.

    Returns the relative error of the result's rank over all modules.
    """
    run = RunFolder(config.run.folder)
    target = open_library(config.target) if config.target is not None else None
    if target is not None:
        target.check_free(config.name)
    merged, expert = _from_library(config) if config.mixture is None else from_mixture(config, config.mixture)
    run.update(status="running")
    expert.save(run.expert)
    layers = [layer.as_data() for layer in merged.layers]
    told = {"method": _settings(config, merged), "error": merged.error, "layers": layers}
    write_atomically(run.merge, json.dumps(told, indent=1, allow_nan=False) + "\n")
    if target is not None:
        target.add_expert(expert, expert_name=config.name)
    run.update(result={"error": merged.error, "revision": expert.revision})
    _show(config, merged, expert, target)
    return merged.error


def _from_library(config: Merge) -> tuple[Merged, Expert]:
    assert config.library is not None
    library = library_of(config.library)
    cards = sound_cards(library, config.experts or ())
    names, left_out = chosen(cards, config.experts)
    if left_out:
        print(f"left out, as merged themselves: {', '.join(left_out)}; experts=[…] takes them in")
    cards = {name: cards[name] for name in names}
    if not config.allow_other_backbone:
        check_same_backbone(cards)
    backbone = _backbone_for(config, cards)
    experts = {name: library.get_expert(name).adapter for name in names}
    merged = merging.merge(
        experts,
        config.method,
        rank=config.rank,
        dtype=config.dtype,
        backbone=None if backbone is None else backbone.model,
        device=_device(config),
    )
    reference = next(iter(cards.values())).backbone
    return merged, _described(config, merged, reference, common_facts(cards, config.library.url))


def _backbone_for(config: Merge, cards: Mapping[str, Card]) -> Backbone | None:
    """The backbone, if one is named; checked against every expert."""
    if config.backbone is None:
        return None
    backbone = backbones.load(config.backbone)
    for name, card in cards.items():
        try:
            check_backbone(card, backbone.name, backbone.shapes, allow_other_backbone=config.allow_other_backbone)
        except LibraryError as error:
            raise LibraryError(f"expert {name!r}: {error}") from error
    return backbone


def from_mixture(config: Merge, place: str) -> tuple[Merged, Expert]:
    """The mixture at `place` as one expert. Raises ValueError where no single expert does the same."""
    folder = mixtures.mixture_folder(place)
    backbone = backbones.load(config.backbone)
    model = mixtures.load_mixture(folder, backbone, allow_other_backbone=config.allow_other_backbone)
    merging.static_weights(model.routers())  # refused before anything is computed
    ids = torch.randint(
        backbone.model.config.get_text_config().vocab_size,
        (2, 16),
        generator=torch.Generator().manual_seed(config.seed),
    ).to(model.device)
    inputs = {"input_ids": ids, "use_cache": False}
    with torch.no_grad():
        wanted = model(**inputs).logits
    experts, routers, stand_ins = model.adapters(), model.routers(), dict(model.stand_ins)
    policy, gated = model.options.modules_to_save, model.options.gate_lora_bias
    if policy != "mix":
        experts = {name: dataclasses.replace(one, full_modules={}, full_names=()) for name, one in experts.items()}
    model.unload()
    merged = merging.one_expert(
        experts,
        routers,
        rank=config.rank,
        dtype=config.dtype,
        backbone=backbone.model,
        gate_lora_bias=gated,
        device=_device(config),
    )
    if stand_ins:
        merged = merging.with_modules(merged, {path: standing.module for path, standing in stand_ins.items()})
    _check_logits(merged, backbone, inputs, wanted)
    card = read_card(folder)
    origins = [{**row, "relation": "merged"} for row in card.derived_from]
    conflict = {key: value for key, value in card.extra.items() if key == "license_conflict"}
    facts = {"tasks": list(card.tasks), "license": card.license, "extra": conflict, "derived_from": origins}
    return merged, _described(config, merged, BackboneRef(backbone.name, backbone.revision, backbone.shapes), facts)


@torch.no_grad()
def _check_logits(merged: Merged, backbone: Backbone, inputs: dict[str, Any], wanted: torch.Tensor) -> None:
    """Raises ValueError unless the expert gives what the mixture gave, as far as its rank and dtype hold all of it."""
    alone = MultiExpertModel(
        backbone.model, {"merged": merged.adapter}, UniformConfig(), train="none", modules_to_save="take:merged"
    ).eval()
    found = alone(**inputs).logits
    alone.unload()
    difference = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    print(f"largest difference from the mixture's logits: {difference:.2g} of the largest logit")
    exact = merged.error == 0 and merged.adapter.dtype in (torch.float32, torch.float64)
    if exact and not difference <= ROUNDING.get(wanted.dtype, 1e-2):
        raise ValueError("the expert does not give what the mixture gives, and was not kept: please report this")


def _device(config: Merge) -> torch.device:
    """Where the arithmetic is done. Raises ValueError for a device that is not here, or has no float64."""
    device = backbones.resolve_device(config.device)
    if device.type == "mps":
        raise ValueError("device=mps has no float64, in which experts are merged: set device=cpu")
    return device


def _settings(config: Merge, merged: Merged) -> dict[str, Any]:
    """The method with its settings, as plain data."""
    name = {"name": "mixture"} if config.mixture is not None else {}
    return {**dataclasses.asdict(merged.config), **name, "rank": config.rank, "dtype": config.dtype}


def _described(config: Merge, merged: Merged, backbone: BackboneRef, facts: dict[str, Any]) -> Expert:
    """The expert with its card."""
    settings = _settings(config, merged)
    settings["method"] = settings.pop("name")
    own = {"tags": list(config.tags), "description": config.description, "training": method_facts(merged, settings)}
    if config.license is not None:
        own |= {"license": config.license, "extra": {}}
    return Expert(describe(merged.adapter, backbone, **{**facts, **own}), merged.adapter)


def _show(config: Merge, merged: Merged, expert: Expert, library: ExpertLibrary | None) -> None:
    """The layers that lost most, and where the result is."""
    lossy = sorted((layer for layer in merged.layers if layer.error > 0), key=lambda layer: -layer.error)
    if lossy:
        table = Table("module", "rank", "norm", "lost", "next σ", title="What the rank lost, worst first")
        for layer in lossy[:SHOWN]:
            table.add_row(
                layer.path, str(layer.rank), f"{layer.norm:.4g}", f"{layer.error:.2%}", f"{layer.next_sigma:.3g}"
            )
        Console().print(table)
    print(f"lost in all: {merged.error:.2%}" if lossy else "nothing was lost")
    where = f"added {config.name} to {library.url}" if library is not None else f"kept in {config.run.folder}/expert"
    print(f"{where}, revision {expert.revision[:8]}")
