"""One expert by a mixture's mean routing over data: an approximation, measured before and after."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole import data, merging, mixtures
from mole.backbones import Backbone
from mole.config.nodes import chosen_datasets
from mole.data import Sample
from mole.data.samples import spread
from mole.evaluation import mean_loss, total
from mole.experts import BackboneRef, Expert, describe
from mole.experts.folder import read_card
from mole.merging import LinearConfig, Merged
from mole.merging.mixture import ByModule
from mole.mixtures import MultiExpertModel
from mole.routers import UniformConfig
from mole.routing import Frame


class MeanRouting:
    """Observes a mixture's forwards: the mean weight of each expert at each mixed module, over the valid tokens."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def observe(self, frame: Frame, phase: str) -> None:
        """One forward: its routings as spent."""
        mask = frame.inputs.attention_mask
        for site, routing in frame.seen.items():
            weights = routing.dense(self.num_experts).detach().double()
            if weights.dim() == 4:
                raise ValueError("a routing of blocks of features has no mean that one expert could have")
            rows, length = weights.shape[:2]
            valid = torch.ones(rows, length, dtype=torch.float64, device=weights.device)
            if mask is not None and mask.shape[0] % rows == 0 and length in (1, mask.shape[1]):
                valid = (mask != 0).double().to(weights.device)
            weights = weights.expand(*valid.shape, -1)
            found = (weights * valid[..., None]).sum((0, 1)).cpu()
            self.sums[site] = self.sums[site] + found if site in self.sums else found
            self.counts[site] = self.counts.get(site, 0.0) + float(valid.sum())

    def weights(self) -> dict[str, list[float]]:
        """Path of a mixed module → weight of each expert."""
        return {site: (total / self.counts[site]).tolist() for site, total in self.sums.items()}


def distilled(config: Any, folder: Path, backbone: Backbone) -> tuple[Merged, dict[str, Any]]:
    """The merge of a mixture's experts by its mean routing over `config.dataset`, and what the card says of it.

    The loss of the mixture and of the expert, on the same samples, are scores of the card. Raises ValueError for
    experts that are not linear in what they hold.
    """
    model = mixtures.load_mixture(folder, backbone, allow_other_backbone=config.allow_other_backbone)
    splits = data.load_many(
        chosen_datasets(config), backbone.tokenizer, seed=config.seed, context_length=backbone.context_length
    )
    name = "+".join(splits)
    held_out, train = (data.joined(splits.values(), split) for split in ("validation", "train"))
    samples = spread(held_out or train, config.examples)
    observer = MeanRouting(len(model.expert_names))
    model.observers.append(observer)
    before = _loss(model, samples, backbone, config.batch_size)
    model.observers.remove(observer)
    weights, experts = observer.weights(), model.adapters()
    model.unload()
    merged = merging.merged_by(
        ByModule(LinearConfig(), tuple(experts), weights), experts, rank=config.rank, backbone=backbone.model
    )
    alone = MultiExpertModel(backbone.model, {"expert": merged.adapter}, UniformConfig(), train="none").eval()
    after = _loss(alone, samples, backbone, config.batch_size)
    alone.unload()
    print(f"loss on {len(samples)} samples of {name}: mixture {before:.4f}, expert {after:.4f}")
    return merged, _facts(config, folder, name, (before, after), len(samples))


def _loss(model: Any, samples: list[Sample], backbone: Backbone, batch_size: int) -> float:
    collate = partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id)
    return total(mean_loss(model, samples, collate, batch_size=batch_size).values()).loss


def _facts(config: Any, folder: Path, name: str, losses: tuple[float, float], examples: int) -> dict[str, Any]:
    card = read_card(folder)
    row = {"task": None, "dataset": name, "split": None, "examples": examples, "higher_is_better": False}
    scores = [{"metric": "loss", "value": losses[1], "config": None, **row}]
    scores.append({"metric": "mixture_loss", "value": losses[0], "config": None, **row})
    return {
        "tasks": list(card.tasks),
        "license": config.license or card.license,
        "tags": list(config.tags),
        "description": config.description,
        "training": {"method": "distilled", "loss_of_mixture": losses[0], "loss": losses[1], "seed": config.seed},
        "scores": scores,
    }


def described(merged: Merged, backbone: Backbone, facts: dict[str, Any]) -> Expert:
    """The expert with its card."""
    ref = BackboneRef(backbone.name, backbone.revision, backbone.shapes)
    return Expert(describe(merged.adapter, ref, **facts), merged.adapter)
