"""from_pretrained and load_model, in the signatures of both generations of the original."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from mole.xlora.building import describe
from mole.xlora.card import BaseFacts
from mole.xlora.checkpoint import Checkpoint, Request, read_checkpoint
from mole.xlora.config import is_device
from mole.xlora.model import XLoraModel
from mole.xlora.options import existing_device
from mole.xlora.places import checkpoint_folder
from mole.xlora.router_files import check_shapes, put_layers
from mole.xlora.saving import MODULES, trained_tensors

_FORMS = (
    "from_pretrained(folder, model, device=None, adapters=None, classifier_path=None, config_path=None, verbose=False, "
    "from_safetensors=True, subfolders=None) or, earlier, from_pretrained(folder, model, adapters, device, verbose, "
    "from_safetensors=True)"
)
_OPTIONS = ("subfolders", "local_files_only", "config_overrides", "allow_other_base")


def from_pretrained(
    load_directory: str | os.PathLike[str], model: PreTrainedModel, *args: Any, **named: Any
) -> XLoraModel:
    """The checkpoint in `load_directory` (a folder or Hub id) on `model`, in eval mode; any format that X-LoRA had.

    By place or by name: `device` of the router, `adapters` (None: the experts saved with the checkpoint; a list: these
    names; a dict: these places), `classifier_path`, `config_path`, `verbose`, `from_safetensors`. By name only:
    `subfolders`, `local_files_only`, `config_overrides` (fields that correct an old config), `allow_other_base`.

    Raises ValueError, and leaves `model` as it was, for whatever is missing, damaged, or made for another base model;
    TypeError for arguments that fit neither form.
    """
    options = {name: named.pop(name) for name in _OPTIONS if name in named}
    slots, overrides = _slots(args, named), dict(options.get("config_overrides") or {})
    if acting := [name for name in ("adapters", "device") if name in overrides]:
        raise ValueError(
            f"config_overrides: got {acting[0]}, which is no setting of the checkpoint; pass {acting[0]}=… beside it"
        )
    if slots.get("from_safetensors") is False:
        raise ValueError(
            "from_safetensors: got False, need True; a .pt file is a pickle, which can run any program: convert it "
            "yourself, in a container without network: python scripts/pickle_to_safetensors.py <file> <folder>"
        )
    request = Request(
        adapters=_with_subfolders(slots.get("adapters"), options.get("subfolders")),
        classifier_path=slots.get("classifier_path"),
        config_path=slots.get("config_path"),
        local_files_only=bool(options.get("local_files_only", False)),
        overrides=overrides,
    )
    folder = checkpoint_folder(load_directory, local_files_only=request.local_files_only)
    checkpoint = read_checkpoint(folder, request)
    if checkpoint.base is not None:
        _check_base(model, checkpoint.base, bool(options.get("allow_other_base", False)))
    built = _build(model, checkpoint, slots.get("device"))
    if slots.get("verbose"):
        describe(built)
    return built


def _build(model: PreTrainedModel, checkpoint: Checkpoint, device: Any) -> XLoraModel:
    """The model, with the router filled; an error gives `model` back as it was."""
    config = checkpoint.config
    config.check(experts=len(checkpoint.experts), hidden=model.config.get_text_config().hidden_size)
    config.device = None if device is None else existing_device(device)
    built = XLoraModel(model, config, checkpoint.experts)
    try:
        _check_sites(built.sites, checkpoint)
        outputs = len(built.experts) * (len(built.sites) if config.layerwise_scalings else 1)
        check_shapes(checkpoint.layers, config, built.shape.hidden_size, outputs, checkpoint.router_file)
        put_layers(built.router, checkpoint.layers)
        _put_modules(built, checkpoint)
    except Exception:
        built.unload()
        raise
    return built


def _put_modules(model: XLoraModel, checkpoint: Checkpoint) -> None:
    """Fills the modules that were trained with the router."""
    here = trained_tensors(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in here.items()}
    got = {name: tuple(tensor.shape) for name, tensor in checkpoint.modules.items()}
    if wanted != got:
        odd = min(set(wanted.items()) ^ set(got.items()))[0]
        raise ValueError(
            f"{MODULES}: {odd}: expected shape {wanted.get(odd, 'none')}, got {got.get(odd, 'none')}; use the base "
            "model that it was trained on, or another modules_to_save with config_overrides"
        )
    with torch.no_grad():
        for name, tensor in checkpoint.modules.items():
            here[name].copy_(tensor)


def _check_sites(sites: tuple[str, ...], checkpoint: Checkpoint) -> None:
    if checkpoint.sites in (None, sites):
        return
    odd = sorted({*sites} ^ {*checkpoint.sites}) or ["their order"]  # type: ignore[misc]
    raise ValueError(
        f"{checkpoint.router_file}: expected the card's {len(checkpoint.sites or ())} layers, got {len(sites)} "
        f"(different: {', '.join(odd[:3])}); the base model has other modules: use the one it was trained on"
    )


def _check_base(model: PreTrainedModel, base: BaseFacts, allow_other: bool) -> None:
    """Raises ValueError for another base model; for one of other sizes even if others are allowed."""
    text = model.config.get_text_config()
    sizes = {"hidden_size": text.hidden_size, "vocab_size": getattr(text, "vocab_size", None)}
    for name, here in sizes.items():
        if getattr(base, name) != here:
            raise ValueError(
                f"base model: expected {name} {getattr(base, name)}, got {here}; load the right base model"
            )
    if allow_other:
        return
    here = {"architecture": type(model).__name__, "id": model.config.name_or_path}
    for name, value in here.items():
        there = getattr(base, name)
        if name == "id" and (not there or not value or os.path.isdir(there) or os.path.isdir(value)):
            continue  # a folder's name says nothing about what is in it
        if there != value:
            raise ValueError(
                f"base model: expected {name} {there!r}, got {value!r}; load that one, or pass allow_other_base=True"
            )


def _slots(args: tuple, named: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by place, told apart by type, joined with those by name."""
    order = ("device", "adapters", "classifier_path", "config_path", "verbose", "from_safetensors")
    found: dict[str, Any] = {}
    for value in args:
        for slot in _fits(value):
            if slot not in found:
                found[slot] = value
                break
        else:
            raise TypeError(f"no place for the argument {value!r} of type {type(value).__name__}; it is {_FORMS}")
    for name, value in named.items():
        if name not in order or name in found:
            what = "two values" if name in order else "no such argument"
            raise TypeError(f"{name}: {what}; it is {_FORMS}")
        found[name] = value
    return found


def _fits(value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return ("verbose", "from_safetensors")
    if isinstance(value, torch.device | int):
        return ("device",)
    if isinstance(value, str):
        return ("device", "classifier_path", "config_path")
    if value is None or isinstance(value, Mapping | list | tuple):
        return ("adapters", "classifier_path", "config_path") if value is None else ("adapters",)
    if isinstance(value, os.PathLike):
        return ("classifier_path", "config_path")
    return ()


def _with_subfolders(adapters: Any, subfolders: Sequence[str | None] | None) -> Any:
    if subfolders is None:
        return adapters
    if not isinstance(adapters, Mapping) or len(adapters) != len(subfolders):
        raise ValueError(f"subfolders: got {len(subfolders)}, need adapters as a dict of as many names and places")
    pairs = zip(adapters.items(), subfolders, strict=True)
    return {name: place if sub is None else (place, sub) for (name, place), sub in pairs}


def load_model(model_name: str, *args: Any, **named: Any) -> tuple[Any, Any]:
    """(model, tokenizer): an X-LoRA checkpoint on its base model, both from folders or the Hub.

    The base model is loaded with the head that it was saved with: of a causal or masked language model, an encoder and
    decoder, or a classifier.

    Late: (model_name = the X-LoRA, device, dtype, adapters, use_flash_attention_2, load_xlora, verbose,
    from_safetensors), with the base model named by the checkpoint. Early: (model_name = the base model,
    fine_tune_model_name = the X-LoRA, device, dtype, adapters, use_flash_attention_2, load_xlora, verbose, use_cache).
    By name only: `padding_side` ("right"), `trust_remote_code` (False), and from_pretrained's options.
    `load_xlora=False` gives the base model alone. Raises ValueError and TypeError as `from_pretrained` does.
    """
    early = "fine_tune_model_name" in named or (bool(args) and isinstance(args[0], str) and not is_device(args[0]))
    common = ["device", "dtype", "adapters", "use_flash_attention_2", "load_xlora", "verbose"]
    order = ["fine_tune_model_name", *common, "use_cache"] if early else [*common, "from_safetensors"]
    if len(args) > len(order):
        raise TypeError(f"load_model takes {1 + len(order)} arguments by place in this form, got {1 + len(args)}")
    given = dict(zip(order, args, strict=False))
    known = {*order, *_OPTIONS, "padding_side", "trust_remote_code"}
    for name, value in named.items():
        if name in given or name not in known:
            raise TypeError(f"load_model: {name}: {'two values' if name in given else 'no such argument in this form'}")
        given[name] = value
    xlora_name = given.pop("fine_tune_model_name") if early else model_name
    base_name = model_name if early else _base_of(xlora_name, given)
    model, tokenizer = _base_model(base_name, given)
    if not given.get("load_xlora", True):
        return model, tokenizer
    passed = ("adapters", "verbose", "from_safetensors", *_OPTIONS)
    options = {name: given[name] for name in passed if name in given}
    return from_pretrained(xlora_name, model, device=given.get("device"), **options), tokenizer


def _base_of(xlora_name: str, given: Mapping[str, Any]) -> str:
    from mole.xlora.checkpoint import base_id

    folder = checkpoint_folder(xlora_name, local_files_only=bool(given.get("local_files_only", False)))
    base = dict(given.get("config_overrides") or {}).get("base_model_id") or base_id(folder)
    if base is None:
        raise ValueError(
            f"{folder}: expected base_model_id, the checkpoint names no base model; use load_model(base, "
            "fine_tune_model_name=…) or config_overrides={'base_model_id': …}"
        )
    return base


# The end of an architecture's name → what loads it; a causal language model where none fits.
_LOADERS: dict[str, Any] = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForConditionalGeneration": AutoModelForSeq2SeqLM,
}


def _class_of(name: str, common: Mapping[str, Any]) -> Any:
    """What loads the base model with the head that its checkpoint has."""
    architectures = AutoConfig.from_pretrained(name, **common).architectures or [""]
    return next((kind for end, kind in _LOADERS.items() if architectures[0].endswith(end)), AutoModelForCausalLM)


def _base_model(name: str, given: Mapping[str, Any]) -> tuple[Any, Any]:
    local, device = bool(given.get("local_files_only", False)), given.get("device")
    dtype = given.get("dtype")
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "use_safetensors": True}
    if given.get("use_flash_attention_2"):
        options["attn_implementation"] = "flash_attention_2"
    common = {"trust_remote_code": bool(given.get("trust_remote_code", False)), "local_files_only": local}
    model = _class_of(name, common).from_pretrained(name, **options, **common)
    if device is not None:
        torch.nn.Module.to(model, torch.device(device))
    if given.get("use_cache") is not None:
        model.config.use_cache = bool(given["use_cache"])
        if model.can_generate():
            model.generation_config.use_cache = model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side=given.get("padding_side", "right"), **common)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer
