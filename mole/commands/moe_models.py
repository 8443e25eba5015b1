"""What a command opens as its model, on which backbone: a mixture of adapters, or the blocks of a `mole moefy` run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mole import backbones, mixtures, moe
from mole.backbones import Backbone
from mole.config import saved
from mole.config.checks import validate
from mole.mixtures import MultiExpertModel
from mole.mixtures.two_pass.speculation import require_routing_pass
from mole.moe import MoEModel
from mole.registry import BACKBONES
from mole.run_folder import RunFolder

logger = logging.getLogger(__name__)
Config = TypeVar("Config")
NONE_CHOSEN = "tiny"  # the backbone that the commands start with unless one is chosen


def on_its_backbone(config: Config) -> Config:
    """The command's config, with the backbone of the run that `config.model` is of, unless another one was chosen.

    What was set beside (device, dtype …) stays. Nothing changes where the model is of no run.
    """
    given: Any = vars(config)["backbone"]
    place = Path(vars(config)["model"]).expanduser()
    run = next((RunFolder(folder) for folder in (place, place.parent) if (folder / "config.yaml").is_file()), None)
    if given.name != NONE_CHOSEN or run is None:
        return config
    node = saved.read(run.config).get("backbone")
    if not isinstance(node, dict) or node.get("name") in (None, NONE_CHOSEN):
        return config
    own: Any = validate(BACKBONES.union(), node)
    default: Any = BACKBONES[NONE_CHOSEN].config()
    kept = {
        name: value for name, value in vars(given).items() if value != getattr(default, name) and hasattr(own, name)
    }
    logger.info("on the backbone of %s, %s", run.path, node.get("path", node["name"]))
    return dataclasses.replace(config, backbone=dataclasses.replace(own, **kept))  # type: ignore[type-var]


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
