"""A model that was saved whole, from its folder alone: description, surgery, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mole.moe.files import CONFIG, load, read_description
from mole.untrusted import Damaged, LibraryError, read_file, shown, strict_json


def open_model(folder: str | Path) -> Any:
    """The model in `folder`, in eval mode, on the CPU.

    Raises LibraryError where the folder does not hold all of it: only the blocks, or no model of transformers; Damaged
    for a description that names no such model.
    """
    folder = Path(folder)
    if not read_description(folder).whole:
        raise LibraryError(f"{folder} holds the blocks alone: load them onto their dense model, or save(…, whole=True)")
    try:
        node = strict_json(read_file(folder / CONFIG, 1 << 20), f"{folder / CONFIG}", max_depth=12)
    except FileNotFoundError:
        raise LibraryError(
            f"{folder} has no {CONFIG}: its dense model is none of transformers; load it yourself"
        ) from None
    with torch.random.fork_rng(devices=[]):
        model = _dense(node, folder)
    return load(model, folder).eval()


def _dense(node: Any, folder: Path) -> Any:
    """The architecture that the description names, one of transformers' own, with weights that nobody has trained."""
    import transformers
    from transformers import AutoConfig, PreTrainedModel

    named = node.get("architectures") if isinstance(node, dict) else None
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    kind = getattr(transformers, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise Damaged(f"{folder / CONFIG}: architectures names {shown(name)}, which is no model of transformers")
    return kind(AutoConfig.for_model(**{key: value for key, value in node.items() if key != "transformers_version"}))
