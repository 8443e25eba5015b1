"""An X-LoRA checkpoint read from a folder, whole and checked, before any model is touched; one function per format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole.adapters import peft_format
from mole.experts.card import bytes_facts
from mole.untrusted import (
    FLOATS,
    MAX_JSON_BYTES,
    MAX_WEIGHTS_BYTES,
    Damaged,
    read_file,
    safetensors_tensors,
    strict_json,
)
from mole.xlora import router_files
from mole.xlora.card import CARD, BaseFacts, CheckpointCard, ExpertRow, parse_card
from mole.xlora.config import xLoRAConfig
from mole.xlora.expert_search import read_experts, wanted_experts
from mole.xlora.places import ReadExpert, pickles_in, refuse_pickle
from mole.xlora.router_files import Layers, original_step
from mole.xlora.saving import CONFIG, MODULES, ROUTER, folder_names


@dataclass(frozen=True)
class Request:
    """What the caller of a loader says beside the folder."""

    adapters: Any = None
    classifier_path: str | os.PathLike[str] | None = None
    config_path: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a model is built from. `sites` and `base` are known where a card was written."""

    config: xLoRAConfig
    experts: dict[str, ReadExpert]
    layers: Layers
    router_file: str
    sites: tuple[str, ...] | None = None
    base: BaseFacts | None = None
    modules: dict[str, Tensor] = field(default_factory=dict)  # trained with the router


def read_checkpoint(folder: Path, request: Request) -> Checkpoint:
    """The checkpoint in `folder`, of any format. Raises ValueError with the path, what was expected and what it has."""
    explicit = request.config_path is not None or request.classifier_path is not None
    if (folder / CARD).is_file() and not explicit:
        return _read_own(folder, request)
    has_original = explicit or (folder / CONFIG).is_file()
    has_peft = not explicit and _is_peft(folder)
    if has_original and has_peft:
        ours, theirs = read_original(folder, request), read_peft(folder, request)
        if not _equal(ours.layers, theirs.layers):
            raise Damaged(
                f"{folder}: {ROUTER} and {peft_format.WEIGHTS} hold different routers, and no {CARD} tells which is "
                "right; remove the files of one, or name them with config_path and classifier_path"
            )
        return ours
    if has_original:
        return read_original(folder, request)
    if has_peft:
        return read_peft(folder, request)
    raise ValueError(f"no X-LoRA checkpoint in {folder}: expected {CARD}, {CONFIG} or a PEFT config of type XLORA")


def _read_own(folder: Path, request: Request) -> Checkpoint:
    card = parse_card(_json_bytes(folder / CARD), str(folder / CARD))
    config = _config({**card.config, "adapters": None}, request, str(folder / CARD))
    if card.router.file != ROUTER:
        raise Damaged(f"{folder / CARD}: router.file: expected {ROUTER}, got {card.router.file!a}")
    data = _router_bytes(folder / ROUTER)
    if bytes_facts(data)["sha256"] != card.router.sha256:
        raise Damaged(
            f"{folder / ROUTER}: expected the file that {CARD} names by its sha256, got another; it was changed"
        )
    layers, _ = router_files.parse_original(data, str(folder / ROUTER), depth=config.xlora_depth)
    wanted = wanted_experts([row.name for row in card.experts], request.adapters, str(folder / CARD))
    experts = {}
    for row, (name, (_, given, _)) in zip(card.experts, wanted.items(), strict=True):
        stored = _card_place(folder, row) if given is None else given
        one = {name: (row.name, stored, None)}
        expert = read_experts(one, folder, str(folder), local_files_only=request.local_files_only)[name]
        if given is None and expert.sha256 != row.sha256:
            raise Damaged(
                f"{stored}: expected the files of expert {row.name!r} that {CARD} names by their sha256, got others; "
                "they were changed: restore them, or pass adapters={name: path} to use other weights knowingly"
            )
        experts[name] = expert
    config.adapters = {name: expert.source for name, expert in experts.items()}
    modules = _trained(folder, card)
    return Checkpoint(config, experts, layers, str(folder / ROUTER), card.layers, card.base, modules)


def _trained(folder: Path, card: CheckpointCard) -> dict[str, Tensor]:
    if card.modules is None:
        return {}
    if card.modules.file != MODULES:
        raise Damaged(f"{folder / CARD}: modules.file: expected {MODULES}, got {card.modules.file!a}")
    data = _router_bytes(folder / MODULES)
    if bytes_facts(data)["sha256"] != card.modules.sha256:
        raise Damaged(f"{folder / MODULES}: expected the file that {CARD} names by its sha256, got another")
    return safetensors_tensors(data, str(folder / MODULES), dtypes={**FLOATS, "F64": 8})


def _card_place(folder: Path, row: ExpertRow) -> str:
    if row.folder is None:
        if row.source is None:
            raise Damaged(f"{folder / CARD}: expert {row.name!r} has neither a folder nor a source")
        return row.source
    if row.folder not in (*folder_names([row.name]), f"expert-{row.index}"):
        raise Damaged(f"{folder / CARD}: expert {row.name!r} cannot lie in the folder {row.folder!a}")
    return str(folder / row.folder)


def read_original(folder: Path, request: Request) -> Checkpoint:
    """The original's two files; its experts from beside them, or from where the config or the caller says."""
    path = Path(request.config_path or folder / CONFIG)
    raw = {**_json_object(path), **request.overrides}
    saved = raw.pop("adapters", None)
    router = Path(request.classifier_path or folder / ROUTER)
    depth = raw.get("xlora_depth", 1)
    known_depth = depth if type(depth) is int and depth > 0 else 1  # the config's check names a bad one below
    layers, step = router_files.parse_original(_router_bytes(router), str(router), depth=known_depth)
    if "enable_relu_and_dropout" not in raw:
        raw["enable_relu_and_dropout"] = _relu(known_depth, step, path)
    config = _config(raw, request, str(path))
    if step is not None and step != original_step(config):
        raise Damaged(
            f"{router}: expected hidden layers {original_step(config)} apart for enable_relu_and_dropout="
            f"{config.enable_relu_and_dropout}, got {step}; pass config_overrides to correct the config"
        )
    wanted = wanted_experts(saved, request.adapters, str(path))
    experts = read_experts(wanted, folder, str(path), local_files_only=request.local_files_only)
    config.adapters = {name: expert.source for name, expert in experts.items()}
    return Checkpoint(config, experts, layers, str(router))


def _relu(depth: int, step: int | None, path: Path) -> bool:
    """What an early config does not say: the spacing of the hidden layers shows it from depth 3 on."""
    if depth == 1:
        return True  # there is nothing between layers
    if step in (1, 3):
        return step == 3
    raise ValueError(
        f"{path}: expected enable_relu_and_dropout, got no such field, and a router of depth {depth} does not show it; "
        "pass config_overrides={'enable_relu_and_dropout': True} or False, as it was trained (early versions: False)"
    )


def read_peft(folder: Path, request: Request) -> Checkpoint:
    """PEFT's two files; its experts by position."""
    path = folder / peft_format.CONFIG
    raw = {**_json_object(path), **request.overrides}
    saved = raw.pop("adapters", None)
    raw.pop("_subfolders", None)
    config = _config(raw, request, str(path))
    if config.use_trainable_adapters and not isinstance(request.adapters, Mapping):
        raise ValueError(
            f"{path}: its experts were trained (use_trainable_adapters), and PEFT saves no trained experts with an "
            "X-LoRA; pass adapters={name: path} with the experts to use, or save the live model with mole"
        )
    router = folder / peft_format.WEIGHTS
    layers = router_files.parse_peft(_router_bytes(router), str(router), config)
    wanted = wanted_experts(saved, request.adapters, str(path))
    experts = read_experts(wanted, folder, str(path), local_files_only=request.local_files_only, stored_first=True)
    config.adapters = {name: expert.source for name, expert in experts.items()}
    return Checkpoint(config, experts, layers, str(router))


def _is_peft(folder: Path) -> bool:
    path = folder / peft_format.CONFIG
    return path.is_file() and _json_object(path).get("peft_type") == "XLORA"


def _config(raw: dict[str, Any], request: Request, what: str) -> xLoRAConfig:
    fields = {**raw, **request.overrides, "device": None}  # where it was trained says nothing about where it runs
    try:
        return xLoRAConfig(**fields)
    except ValueError as error:
        hint = ""
        if fields.get("enable_softmax_topk") and fields.get("top_k_lora") is None:
            hint = (
                "; what the writer computed was a dense softmax: config_overrides={'enable_softmax_topk': False, "
                "'enable_softmax': True, 'softmax_temperature': 1.0} keeps it"
            )
        elif fields.get("enable_softmax_topk") and fields.get("enable_softmax", True):
            hint = "; the writer took both softmaxes, which no setting here repeats"
        raise ValueError(f"{what}: {error}{hint}; config_overrides={{field: value}} corrects a file's field") from None


def _json_bytes(path: Path) -> bytes:
    try:
        return read_file(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a JSON file, it is not there") from None


def _json_object(path: Path) -> dict[str, Any]:
    value = strict_json(_json_bytes(path), str(path))
    if not isinstance(value, dict):
        raise Damaged(f"{path}: expected an object, got {type(value).__name__}")
    return value


def _router_bytes(path: Path) -> bytes:
    if path.suffix != ".safetensors" and path.is_file():
        raise refuse_pickle(path)
    try:
        return read_file(path, MAX_WEIGHTS_BYTES)
    except FileNotFoundError:
        for pickle in pickles_in(path.parent, [path.stem]):
            raise refuse_pickle(pickle) from None
        raise ValueError(f"{path}: expected weights, the file is not there") from None


def _equal(one: Layers, other: Layers) -> bool:
    """The same weights; PEFT writes zeros for biases that are not there."""
    if len(one) != len(other):
        return False
    for (w1, b1), (w2, b2) in zip(one, other, strict=True):
        b1 = w1.new_zeros(len(w1)) if b1 is None else b1
        b2 = w2.new_zeros(len(w2)) if b2 is None else b2
        if not (torch.equal(w1.float(), w2.float()) and torch.equal(b1.float(), b2.float())):
            return False
    return True


def base_id(folder: Path) -> str | None:
    """The base model that the checkpoint in `folder` names, if it names one."""
    if (folder / CARD).is_file():
        return parse_card(_json_bytes(folder / CARD), str(folder / CARD)).base.id
    if (folder / CONFIG).is_file():
        return _json_object(folder / CONFIG).get("base_model_id")
    return _json_object(folder / peft_format.CONFIG).get("base_model_name_or_path") if _is_peft(folder) else None
