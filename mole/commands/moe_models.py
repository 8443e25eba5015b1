"""What a command opens as its model: a mixture of adapters, or the blocks of a `mole moefy` run on their backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mole import backbones, mixtures, moe
from mole.backbones import Backbone
from mole.mixtures import MultiExpertModel
from mole.mixtures.two_pass.speculation import require_routing_pass
from mole.moe import MoEModel


def open_any(place: str, backbone: Backbone, *, allow_other_backbone: bool = False) -> MultiExpertModel | MoEModel:
    """The model at `place`, in eval mode. Raises ValueError where there is none, or one for another backbone."""
    if (folder := mixtures.blocks_in(place)) is not None:
        return MoEModel(moe.load(backbone.model, folder)).eval()
    return mixtures.open_model(place, backbone, allow_other_backbone=allow_other_backbone)


def check_generation(model: MultiExpertModel | MoEModel, *, self_speculation: bool, log: bool, num_beams: int) -> None:
    """Raises ValueError for ways of generating that the model does not have."""
    if isinstance(model, MultiExpertModel):
        if self_speculation:
            require_routing_pass(model)
    elif self_speculation:
        raise ValueError(
            "self_speculation drafts with a routing pass, and the blocks of mole moefy have none: leave it out"
        )
    elif log and num_beams > 1:
        raise ValueError("log=true with beams: a row of the routing log would change its text; set num_beams=1")


@contextmanager
def without_blocks(model: MoEModel, config: Any) -> Iterator[None]:
    """In the body `model` is the backbone of `config` as it was before the surgery, loaded once more."""
    whole, model.model = model.model, backbones.load(config).model
    try:
        yield
    finally:
        model.model = whole
