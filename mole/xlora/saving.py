"""An X-LoRA model as a folder that mole, the original, PEFT and mistral.rs read; written beside, then put in place.

mole_xlora.json                                  the card: what mole trusts
xlora_config.json, xlora_classifier.safetensors  the original's files, with its keys
adapter_config.json, adapter_model.safetensors   PEFT's X-LoRA, where it can hold the model
modules_to_save.safetensors                      modules trained with the router (modules_to_save=train)
<expert>/                                        a plain PEFT folder for each expert
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from mole.adapters import Adapter, peft_format
from mole.experts.card import bytes_facts
from mole.run_folder import write_atomically
from mole.untrusted import Damaged, read_file
from mole.xlora import peft_layout, router_files
from mole.xlora.card import (
    CARD,
    FORMAT,
    VERSION,
    CheckpointCard,
    ExpertRow,
    ModulesRow,
    PeftLayout,
    RouterRow,
    base_facts,
    parse_card,
)
from mole.xlora.places import digest
from mole.xlora.readme import MARK, README, readme

if TYPE_CHECKING:
    from mole.xlora.model import XLoraModel

LAYOUTS = ("xlora", "peft")
CONFIG, ROUTER, MODULES = "xlora_config.json", "xlora_classifier.safetensors", "modules_to_save.safetensors"
# The original fails on any key that is not one of these.
ORIGINAL_FIELDS = (
    "hidden_size",
    "base_model_id",
    "adapters",
    "enable_softmax",
    "enable_softmax_topk",
    "layerwise_scalings",
    "xlora_depth",
    "xlora_size",
    "enable_relu_and_dropout",
    "use_bias",
    "xlora_dropout_p",
    "use_trainable_adapters",
    "softmax_temperature",
    "top_k_lora",
    "scaling_pass_value",
    "global_scaling_weight",
)
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,94}", re.ASCII)
_RESERVED = {CARD, CONFIG, ROUTER, MODULES, peft_format.CONFIG, peft_format.WEIGHTS, README, "adapters"}
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows keeps for itself


def save_checkpoint(model: XLoraModel, folder: Path, *, layouts: Iterable[str], experts: str) -> None:
    """Writes `model` into `folder`, which is made if absent; other files in it stay.

    Raises ValueError for a layout or a way with experts that is not known or not possible; nothing is then written.
    """
    layouts = (layouts,) if isinstance(layouts, str) else tuple(layouts)
    if unknown := [layout for layout in layouts if layout not in LAYOUTS]:
        raise ValueError(f"layouts: got {unknown[0]!r}, need some of {', '.join(LAYOUTS)}")
    if experts not in ("embed", "reference"):
        raise ValueError(f"experts: got {experts!r}, need 'embed' (copies) or 'reference' (their places only)")
    layers = router_files.layers_of(model.router)
    names = ("weight", "bias")
    parts = {f"router: {names[i]} of layer {k + 1}": w for k, pair in enumerate(layers) for i, w in enumerate(pair)}
    tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
    _check_finite({**tensors, **trained_tensors(model)})
    rows, files = _experts(model, folder, experts)
    files |= {ROUTER: router_files.dump_original(layers, model.xlora_config), CONFIG: _original_config(model)}
    if trained := trained_tensors(model):
        files[MODULES] = save({name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()})
    reason = "not asked for" if "peft" not in layouts else peft_layout.obstacle(model, experts)
    if reason is None:
        files |= peft_layout.files(model, folder, rows, layers)
    elif layouts != LAYOUTS and "peft" in layouts:
        raise ValueError(f"layouts: PEFT cannot hold this model: {reason}; leave 'peft' out of layouts")
    card = CheckpointCard(
        format=FORMAT,
        version=VERSION,
        config={**model.xlora_config.to_dict(), "adapters": list(model.experts)},
        base=base_facts(model.backbone, model.xlora_config.base_model_id),
        experts=rows,
        layers=model.sites,
        router=_router_row(layers, files[ROUTER], model),
        peft_layout=PeftLayout(written=reason is None, reason=reason),
        modules=ModulesRow(file=MODULES, sha256=bytes_facts(files[MODULES])["sha256"]) if trained else None,
    )
    if not (folder / README).is_file() or MARK in (folder / README).read_text(encoding="utf-8", errors="replace"):
        files[README] = readme(card, folder).encode()
    _put(folder, files, card.to_bytes(), _stale(folder))


def folder_names(names: Iterable[str]) -> list[str]:
    """A folder for each expert: its own name where that is safe and unique everywhere, else `expert-<index>`."""
    names = list(names)
    lower = [name.lower() for name in names]
    found = []
    for index, name in enumerate(names):
        safe = _FOLDER.fullmatch(name) and ".." not in name and not name.endswith((".", " "))
        free = name not in _RESERVED and not _DEVICES.fullmatch(name) and not name.lower().startswith("expert-")
        found.append(name if safe and free and lower.count(name.lower()) == 1 else f"expert-{index}")
    return found


def trained_tensors(model: XLoraModel) -> dict[str, Tensor]:
    """The tensors of the modules that are trained with the router, `<path>.<name>` → tensor, live."""
    return {
        f"{path}.{name}": tensor
        for path, module in model.trained_modules().items()
        for name, tensor in module.state_dict().items()
    }


def _experts(model: XLoraModel, folder: Path, how: str) -> tuple[tuple[ExpertRow, ...], dict[str, bytes]]:
    trains = model.get_use_trainable_adapters()
    if how == "reference":
        if trains or any(source.changed for source in model.sources.values()):
            raise ValueError(
                "experts='reference': the experts were trainable, so their files are not what they are now; "
                "use experts='embed'"
            )
        unknown = [name for name, expert in model.sources.items() if expert.source is None]
        if unknown:
            raise ValueError(f"experts='reference': {unknown[0]!r} was read from no file; use experts='embed'")
    rows, files = [], {}
    for index, (name, place) in enumerate(zip(model.experts, folder_names(model.experts), strict=True)):
        expert = model.sources[name]
        if how == "reference":
            assert expert.sha256 is not None
            row = ExpertRow(
                index=index, name=name, folder=None, source=expert.source, sha256=expert.sha256, trainable=False
            )
        else:
            data = peft_format.dump(_current(model, name), model.xlora_config.base_model_id)
            files |= {f"{place}/{file}": content for file, content in data.items()}
            sha256 = digest(data[peft_format.CONFIG], data[peft_format.WEIGHTS])
            row = ExpertRow(index=index, name=name, folder=place, source=None, sha256=sha256, trainable=trains)
        rows.append(row)
    return tuple(rows), files


def _current(model: XLoraModel, name: str) -> Adapter:
    expert = model.sources[name]
    if expert.adapter is not None and not expert.changed:
        return expert.adapter
    adapter = model.adapters()[name]
    _check_finite({f"expert {name!r} at {path}": tensor for path, tensor in adapter.tensors().items()})
    return adapter


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for NaN and infinity: no reader takes them, and they must replace no good checkpoint."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name}: got values that are not finite (NaN or infinity), need numbers; nothing was saved: go back "
                "to an earlier checkpoint, and train with a lower learning rate or clipped gradients"
            )


def _original_config(model: XLoraModel) -> bytes:
    config = {**model.xlora_config.to_dict(), "adapters": list(model.experts)}
    config["base_model_id"] = config["base_model_id"] or model.backbone.config.name_or_path or None
    return _json({name: config[name] for name in ORIGINAL_FIELDS})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _router_row(layers: router_files.Layers, data: bytes, model: XLoraModel) -> RouterRow:
    shapes = {}
    for k, (weight, bias) in enumerate(layers):
        shapes[f"{k}.weight"] = tuple(weight.shape)
        if bias is not None:
            shapes[f"{k}.bias"] = tuple(bias.shape)
    dtype = str(layers[0][0].dtype).removeprefix("torch.")
    return RouterRow(file=ROUTER, sha256=bytes_facts(data)["sha256"], dtype=dtype, shapes=shapes)


def _stale(folder: Path) -> list[str]:
    """Files of an earlier checkpoint in `folder`, which a new one must not leave beside its own."""
    found = [CONFIG, ROUTER, MODULES]
    if not (folder / CARD).is_file():
        return found
    try:
        card = parse_card(read_file(folder / CARD, 1 << 20), str(folder / CARD))
    except (Damaged, OSError):
        return found
    if card.peft_layout.written:
        found += [peft_format.CONFIG, peft_format.WEIGHTS]
    for row in card.experts:
        if row.folder is not None and row.folder in (*folder_names([row.name]), f"expert-{row.index}"):
            found += [f"{row.folder}/{peft_format.CONFIG}", f"{row.folder}/{peft_format.WEIGHTS}"]
    return found


def _put(folder: Path, files: dict[str, bytes], card: bytes, stale: list[str]) -> None:
    """All files beside their places first, then each into its place, the card last; an error puts everything back."""
    staged = folder / f".xlora.partial-{uuid.uuid4().hex[:12]}"
    everything = {**files, CARD: card}
    moved: list[tuple[Path, Path]] = []  # (from, to), to be undone
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, data in everything.items():
            write_atomically(staged / "new" / name, data)
        for name in dict.fromkeys([CARD, *stale, *files]):
            if (folder / name).exists():
                _move(folder / name, staged / "old" / name, moved)
        for name in everything:
            _move(staged / "new" / name, folder / name, moved)
    except BaseException:
        for source, target in reversed(moved):
            _move(target, source, [])
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    for name in stale:
        parent = (folder / name).parent
        if parent != folder and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _move(source: Path, target: Path, moved: list[tuple[Path, Path]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    moved.append((source, target))
