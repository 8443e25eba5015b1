"""A model with blocks on disk: what was done to it, and the weights that came of it, in one folder.

    moe.json            format, versions, the patterns, each block: its names, width, experts and configuration
    model.safetensors   the blocks' weights, or the whole model's, by the names of its state dict
    config.json         transformers' description of the dense model, where it is one

Nothing in it names a class: a configuration is checked against its closed schema, weights are safetensors.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from mole import __version__
from mole.moe.config import MoEConfig
from mole.moe.surgery import Surgery, apply_surgery, digest_of, surgery_of
from mole.registry import config_dataclass
from mole.run_folder import write_folder_atomically
from mole.untrusted import (
    MAX_WEIGHTS_BYTES,
    Damaged,
    LibraryError,
    read_file,
    safetensors_tensors,
    strict_json,
)

FORMAT = 1
MOE, WEIGHTS, CONFIG = "moe.json", "model.safetensors", "config.json"
STATE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@config_dataclass
class SavedBlock:
    """One block: all names of the module it stands for, the features it takes, its experts, how it routes."""

    names: tuple[str, ...]
    input_dim: int
    num_experts: int
    config: dict[str, Any]


@config_dataclass
class SavedModel:
    """What moe.json says. `rest` is the digest of what lies outside the blocks, where that is not in the folder."""

    format: int
    versions: dict[str, str]
    patterns: tuple[str, ...]
    blocks: tuple[SavedBlock, ...]
    whole: bool
    rest: str | None = None


def save(model: nn.Module, folder: str | Path, *, whole: bool | None = None, replace: bool = False) -> Path:
    """Writes what `load` needs beside the dense model into the new folder `folder`, whole or not at all.

    `whole`: all weights, not the blocks' alone; None: if something outside them is trainable. Raises ValueError if
    nothing was done to the model by `moefy`, FileExistsError if the folder exists, unless `replace` is set.
    """
    record = surgery_of(model)
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    inside = {name for name in state if _is_inside(name, record)}
    trained = any(p.requires_grad for name, p in model.named_parameters() if name not in inside)
    whole = trained if whole is None else whole
    chosen = state if whole else {name: tensor for name, tensor in state.items() if name in inside}
    described = SavedModel(
        format=FORMAT,
        versions={"mole": __version__, "torch": str(torch.__version__)},
        patterns=tuple(record.patterns),
        blocks=tuple(_saved(wrapped) for wrapped in record.wrapped),
        whole=whole,
        rest=None if whole else digest_of((n, t) for n, t in state.items() if n not in inside),
    )
    files = {
        MOE: TypeAdapter(SavedModel).dump_json(described, indent=1) + b"\n",
        WEIGHTS: tensor_bytes({name: _stored(tensor) for name, tensor in _distinct(chosen).items()}),
    }
    told = getattr(getattr(model, "config", None), "to_json_string", None)
    if told is not None:
        node = {**json.loads(told(use_diff=False)), "architectures": [type(model).__name__]}
        files[CONFIG] = (json.dumps(node, indent=1, sort_keys=True) + "\n").encode()

    def fill(target: Path) -> None:
        for name, data in files.items():
            (target / name).write_bytes(data)

    write_folder_atomically(folder, fill, replace=replace)
    return Path(folder)


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Repeats on the dense `model`, in place, the surgery that `folder` tells of, and gives it the weights from there.

    Returns the model, whose outputs are bit for bit those of the saved one on the same machine. Raises Damaged for a
    folder that is not as `save` writes it, ValueError if the model is another one.
    """
    folder = Path(folder)
    described = read_description(folder)
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for block in described.blocks for name in block.names if name not in modules]
    if missing:
        raise ValueError(f"{folder}: this {type(model).__name__} has no module {missing[0]}: it is for another model")
    configs = [_config(block.config, folder) for block in described.blocks]
    weights = safetensors_tensors(read_file(folder / WEIGHTS, MAX_WEIGHTS_BYTES), f"{folder / WEIGHTS}", dtypes=STATE)
    places = [
        (block.names, block.input_dim, replace(config, num_experts=block.num_experts))
        for block, config in zip(described.blocks, configs, strict=True)
    ]
    record = apply_surgery(model, places, list(described.patterns))
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    if not described.whole:
        rest = {name: tensor for name, tensor in state.items() if not _is_inside(name, record)}
        if digest_of(rest.items()) != described.rest:
            raise ValueError(
                f"{folder} holds the blocks alone, and the rest of this {type(model).__name__} has other weights than "
                "the model that was saved: load onto that model, or save(…, whole=True)"
            )
        state = {name: tensor for name, tensor in state.items() if name not in rest}
    _fill(_distinct(state), weights, folder)
    for wrapped in record.wrapped:  # what it was before is not what it is now
        wrapped.digest = ""
    return model


def read_description(folder: Path) -> SavedModel:
    """moe.json, checked. Raises Damaged, LibraryError if there is none."""
    path = folder / MOE
    try:
        found = strict_json(read_file(path, 1 << 24), str(path), max_bytes=1 << 24)
    except FileNotFoundError:
        raise LibraryError(f"{folder} has no {MOE}: it is no folder that mole.moe.save has written") from None
    try:
        described = TypeAdapter(SavedModel).validate_json(json.dumps(found))
    except ValidationError as error:
        raise Damaged(f"{path}: not as mole.moe.save writes it: {_first(error)}") from None
    if described.format != FORMAT:
        raise Damaged(f"{path}: its format is {described.format}, this version reads {FORMAT}")
    return described


# ---- the parts
def _saved(wrapped: Any) -> SavedBlock:
    config = TypeAdapter(MoEConfig).dump_python(wrapped.block.config, mode="json")
    count = len(wrapped.block.experts)
    return SavedBlock(names=wrapped.names, input_dim=wrapped.input_dim, num_experts=count, config=config)


def _config(node: dict[str, Any], folder: Path) -> MoEConfig:
    try:
        return TypeAdapter(MoEConfig).validate_json(json.dumps(node))
    except ValidationError as error:
        raise Damaged(f"{folder / MOE}: a block's configuration: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    row = error.errors()[0]
    return f"{'.'.join(map(str, row['loc']))}: {row['msg']}"


def _is_inside(name: str, record: Surgery) -> bool:
    return any(name.startswith(f"{place}.") for wrapped in record.wrapped for place in wrapped.names)


def _distinct(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under its first name only: a tied weight is one."""
    seen: set[int] = set()
    found = {}
    for name, tensor in state.items():
        if id(tensor) not in seen and tensor.numel():
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _stored(tensor: Tensor) -> Tensor:
    """As the file has it: on the CPU, in one piece, at least one dimension."""
    return tensor.detach().cpu().contiguous().reshape(tensor.shape or (1,)).clone()


@torch.no_grad()
def _fill(state: dict[str, Tensor], weights: dict[str, Tensor], folder: Path) -> None:
    """Copies the weights into the model's tensors of the same names. Raises ValueError if they do not fit exactly."""
    shapes = {name: (tuple(tensor.shape or (1,)), tensor.dtype) for name, tensor in state.items()}
    given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    if shapes != given:
        odd = next(name for name in sorted({*shapes, *given}) if shapes.get(name) != given.get(name))
        there, here = given.get(odd, "absent"), shapes.get(odd, "absent")
        raise ValueError(f"{folder / WEIGHTS} does not fit this model: {odd} is {there} there, {here} here")
    for name, tensor in weights.items():
        state[name].copy_(tensor.reshape(state[name].shape))
