"""`mole edit-moe`: add experts to a saved mixture, remove or replace some; its router keeps what it has learned."""

import dataclasses
import logging
from functools import partial

import torch

from mole import backbones, data, mixtures
from mole.backbones import Backbone
from mole.commands.library.opening import library_of
from mole.commands.preparing import prepare
from mole.config.nodes import RunConfig, chosen_datasets
from mole.config.seeds import seed_for
from mole.data import Sample
from mole.experts import Expert, licences
from mole.experts.folder import read_card
from mole.mixtures import MultiExpertModel
from mole.mixtures.growing import put_together, take_apart
from mole.mixtures.preparing.prototype_data import samples_of, unprepared
from mole.registry import BACKBONES, DATASETS, LIBRARIES, config_dataclass, unknown
from mole.run_folder import RunFolder
from mole.training import TrainingConfig, make_accelerator

logger = logging.getLogger(__name__)


@config_dataclass
class EditMoe:
    """A mixture, and what changes in it."""

    backbone: BACKBONES.union()  # type: ignore[valid-type]
    library: LIBRARIES.union() | None = None  # type: ignore[valid-type]
    dataset: DATASETS.union() | None = None  # type: ignore[valid-type]
    datasets: dict[str, DATASETS.union()] = dataclasses.field(default_factory=dict)  # type: ignore[valid-type]
    mixture: str
    name: str = "mixture"
    add: tuple[str, ...] = ()
    replace: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    allow_other_backbone: bool = False
    seed: int = 0
    run: RunConfig

    def __post_init__(self):
        problems = []
        if (self.add or self.replace) and self.library is None:
            problems.append("add and replace take experts of a library: give library=<one>")
        if (self.dataset or self.datasets) and not (self.add or self.replace):
            problems.append("dataset is for experts that come in: give add or replace, or leave it out")
        listed = [*self.add, *self.replace, *self.remove]
        twice = sorted({name for name in listed if listed.count(name) > 1})
        if twice:
            problems.append(f"{', '.join(twice)}: named twice among add, replace and remove")
        if problems:
            raise ValueError("; ".join(problems))


def run(config: EditMoe) -> None:
    """Leaves the changed mixture in `mixture/`; the old one is as it was."""
    if not (config.add or config.replace or config.remove):
        raise ValueError("nothing to change: give add, replace or remove a list of experts")
    run = RunFolder(config.run.folder)
    backbone = backbones.load(config.backbone)
    source = mixtures.mixture_folder(config.mixture)
    origins = mixtures.origins_of(source)
    _check(config, tuple(origins))
    new = _experts(config)
    old = mixtures.load_mixture(source, backbone, allow_other_backbone=config.allow_other_backbone)
    model = _changed(config, old, new)
    samples = _samples(config, model, backbone)
    run.update(status="running")  # what is refused until here leaves nothing
    if samples:
        collate = partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id)
        training = TrainingConfig()
        accelerator = make_accelerator(training, model.device)
        run.update(prepared=prepare(model, samples, collate, training, accelerator, run))
    origins |= mixtures.pinned(new, config.library.url if config.library else None)
    parts = {"the mixture": read_card(source).license, **{name: expert.card.license for name, expert in new.items()}}
    mixtures.save_mixture(
        model,
        run.mixture,
        backbone,
        origins={name: origins[name] for name in model.expert_names},
        replace=False,
        **licences.facts(parts),
    )
    _tell(config, model)
    run.update(result={"experts": list(model.expert_names), "learns": _learns(model)})


def _check(config: EditMoe, present: tuple[str, ...]) -> None:
    for name in (*config.remove, *config.replace):
        if name not in present:
            raise ValueError(unknown("expert of this mixture", name, present))
    for name in config.add:
        if name in present:
            raise ValueError(f"{name!r} is in this mixture: replace=[{name}] takes its newest revision")
    if set(config.remove) == set(present) and not config.add:
        raise ValueError("remove: a mixture needs at least one expert")


def _experts(config: EditMoe) -> dict[str, Expert]:
    """The experts of the library that come in."""
    names = (*config.add, *config.replace)
    if not names or config.library is None:
        return {}
    return mixtures.experts_of(library_of(config.library), names)


def _changed(config: EditMoe, old: MultiExpertModel, new: dict[str, Expert]) -> MultiExpertModel:
    parts = take_apart(old)
    kept = {name: adapter for name, adapter in parts.experts.items() if name not in config.remove}
    experts = {**kept, **{name: expert.adapter for name, expert in new.items()}}
    tasks = {**parts.tasks, **{name: expert.card.tasks for name, expert in new.items()}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("init", config.seed))
        own = {name: tasks[name] for name in experts}
        taught = bool(config.dataset or config.datasets)
        return put_together(parts, experts, own, replaced=config.replace, taught=taught)


def _samples(config: EditMoe, model: MultiExpertModel, backbone: Backbone) -> list[Sample]:
    """What the router learns of the experts that come in, checked; none where no dataset is given."""
    if not (config.dataset or config.datasets):
        return []
    context = backbone.context_length
    splits = data.load_many(chosen_datasets(config), backbone.tokenizer, seed=config.seed, context_length=context)
    samples = data.joined(splits.values(), "train")
    samples_of(model, samples, unprepared(model))
    return list(samples)


def _learns(model: MultiExpertModel) -> bool:
    return any(router.learned for router in model.routers().values())


def _tell(config: EditMoe, model: MultiExpertModel) -> None:
    logger.info("experts now: %s", ", ".join(model.expert_names))
    if _learns(model) and config.add:
        logger.warning(
            "router=%s has not seen %s yet: what it says of them is its start; "
            "mole build-moe start_from=%s trains it further",
            model.router_config.name,
            ", ".join(config.add),
            config.run.folder,
        )
