"""The ordering file of mistral.rs: the experts in the router's order, and each mixed module's place among the gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mole.run_folder import write_atomically

if TYPE_CHECKING:
    from mole.xlora.model import XLoraModel

ARCHITECTURES = ("Llama", "Mistral", "Mixtral", "Gemma", "Phi", "Starcoder2")


def write_ordering(model: XLoraModel, path: Path) -> None:
    """Writes the file.

    Raises ValueError for what mistral.rs has not (other architectures, softmax over the top k), and where nothing names
    the base model, which it loads by that name.
    """
    if model.xlora_config.enable_softmax_topk:
        raise ValueError("enable_softmax_topk: got True, need False; mistral.rs has no softmax over the top k")
    architecture = type(model.backbone).__name__.removesuffix("ForCausalLM")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"base model: got {architecture}, need one of {', '.join(ARCHITECTURES)} for mistral.rs")
    base = model.xlora_config.base_model_id or model.backbone.config.name_or_path or None
    if base is None:
        raise ValueError(
            "base_model_id: got None, need the base model's Hub id or folder, by which mistral.rs loads it; assign it "
            "to xlora_config.base_model_id"
        )
    ordering = {
        "order": list(model.experts),
        "layers": {site: index for index, site in enumerate(model.sites)},
        "base_model_id": base,
    }
    write_atomically(path, json.dumps(ordering, indent=2) + "\n")
