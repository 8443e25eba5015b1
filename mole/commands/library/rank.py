"""`mole library rank`: which experts of a library are best for a small sample of new data: the loss of each on it."""

import logging
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from mole import backbones, data
from mole.backbones import Backbone
from mole.commands.library.opening import open_library
from mole.commands.library.output import print_json, print_table
from mole.config.nodes import chosen_datasets
from mole.data import Sample
from mole.evaluation import mean_loss, nearest_experts, total
from mole.experts import ExpertLibrary, LibraryError, UnknownExpert, check_backbone
from mole.experts.card import digest_of
from mole.experts.embeddings import comparable
from mole.registry import BACKBONES, DATASETS, config_dataclass

KIND, CODE = "sample-loss", 1
logger = logging.getLogger(__name__)


@config_dataclass
class LibraryRank:
    """Which experts, on which data, and how much of it."""

    backbone: BACKBONES.union()  # type: ignore[valid-type]
    dataset: DATASETS.union() | None = None  # type: ignore[valid-type]
    datasets: dict[str, DATASETS.union()] = Field(default_factory=dict)  # type: ignore[valid-type]
    library: str
    experts: tuple[str, ...] | None = None
    examples: Annotated[int, Field(ge=1)] = 64
    batch_size: Annotated[int, Field(ge=1)] = 8
    limit: Annotated[int, Field(ge=1)] | None = None
    store: bool = True
    allow_other_backbone: bool = False
    seed: int = 0
    format: Literal["table", "json", "names"] = "table"

    def __post_init__(self) -> None:
        chosen_datasets(self)


def run(config: LibraryRank) -> None:
    """Prints the experts, best first, with their loss and what they gain over the bare backbone."""
    library = open_library(config.library)
    names = comparable(library, config.experts, least=1)
    backbone = backbones.load(config.backbone)
    for name in names:
        try:
            card, shapes = library.card(name), backbone.shapes
            check_backbone(card, backbone.name, shapes, allow_other_backbone=config.allow_other_backbone)
        except ValueError as error:
            raise LibraryError(f"expert {name!r}: {error}") from error
    splits = data.load_many(
        chosen_datasets(config), backbone.tokenizer, seed=config.seed, context_length=backbone.context_length
    )
    samples = data.spread(data.joined(splits.values(), "train"), config.examples)
    losses = _losses(config, library, names, backbone, samples)
    collate = partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id)
    base = total(mean_loss(backbone.model, samples, collate, batch_size=config.batch_size).values()).loss
    ranked = sorted(losses.items(), key=lambda row: (row[1], row[0]))[: config.limit]
    if config.format == "json":
        rows = [{"expert": name, "loss": loss, "gain": base - loss} for name, loss in ranked]
        return print_json({"examples": len(samples), "backbone_loss": base, "experts": rows})
    if config.format == "names":
        return print("".join(f"{name}\n" for name, _ in ranked), end="")
    print_table(("expert", "loss", "gain"), [[name, f"{loss:.4f}", f"{base - loss:+.4f}"] for name, loss in ranked])
    print(f"loss in nats per token on {len(samples)} examples; the bare backbone has {base:.4f}")
    return None


def _losses(
    config: LibraryRank, library: ExpertLibrary, names: list[str], backbone: Backbone, samples: list[Sample]
) -> dict[str, float]:
    """Name → loss; what the library knows of these samples already is not computed again."""
    making: dict[str, Any] = {
        "backbone": digest_of([backbone.name, backbone.revision, backbone.shapes]),
        "data": digest_of([[list(sample.input_ids), list(sample.labels)] for sample in samples]),
        "code": CODE,
    }
    found: dict[str, float] = {}
    for name in names:
        try:
            found[name] = library.artefact(name, KIND, None, None, **making)["loss"]
        except UnknownExpert:
            continue
    missing = {name: library.get_expert(name).adapter for name in names if name not in found}
    logger.info("%d of %d losses are known already", len(found), len(names))
    if missing:
        new = nearest_experts(
            backbone.model,
            missing,
            samples,
            partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id),
            examples=len(samples),
            batch_size=config.batch_size,
        )
        for name, loss in new:
            found[name] = loss
            if config.store:
                library.artefact(name, KIND, None, partial(dict, loss=loss), **making)
    return found
