"""Load a pretrained causal language model from a folder or the Hub, frozen, with its tokenizer."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from mole.backbones.heads import (
    HeadKind,
    Pooling,
    check_padding,
    class_for,
    head_modules,
    in_float32,
    options_for,
    pooler_of,
    seeded,
    with_head,
)
from mole.backbones.quantised import loading_options, whole_shape
from mole.backbones.room import check_room
from mole.head import Head
from mole.registry import BACKBONES, config_dataclass

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


class Placement(Protocol):
    """Where and how weights are held: fields that every backbone's config has."""

    @property
    def dtype(self) -> Dtype: ...
    @property
    def device(self) -> str: ...
    @property
    def attention(self) -> Attention: ...


@config_dataclass
class PretrainedConfig:
    """Any language model in transformers' format; `head` and `pooling` see mole/backbones/heads.py."""

    name: Literal["pretrained"] = "pretrained"
    path: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    attention: Attention = "auto"
    bits: Literal[4, 8] | None = None
    head: HeadKind = "native"
    pooling: Pooling = "auto"


@dataclass(frozen=True)
class Backbone:
    """A frozen model in eval mode with its tokenizer.

    `name` is the label that cards carry: a Hub id, or a folder's name. `revision` is the Hub commit, if there is one.
    `shapes` is the sha256 over the sorted `name shape` lines of the parameters, heads left out: it tells backbones
    apart without their weights. `head` what the data asked for, `head_modules` the paths of what was put on the model
    for it, `pooler` that of a pooler which the head reads.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    revision: str | None
    shapes: str
    head: Head | None = None
    head_modules: tuple[str, ...] = ()
    pooler: str | None = None

    def trained_along(self, *, pooler: bool = True) -> tuple[str, ...]:
        """Paths of the modules that are trained with an adapter or a router: the head, and the pooler if wanted."""
        return (*([self.pooler] if pooler and self.pooler else []), *self.head_modules)

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can take, if its config says so."""
        length = getattr(self.model.config, "max_position_embeddings", None)
        embedding = getattr(getattr(self.model.base_model, "embeddings", None), "position_embeddings", None)
        padding = getattr(embedding, "padding_idx", None)  # RoBERTa's positions start behind that of padding
        return length if length is None or padding is None else length - padding - 1


def load(config: Any, *, head: Head | None = None, seed: int = 0) -> Backbone:
    """The backbone that `config.name` names, under a head for whole texts if the data asks for one.

    `seed` makes the first weights of the head. Raises ValueError for a device that is not there, a path that is neither
    a folder with a model nor a Hub id, weights larger than what is free, a damaged file, missing weights, or a
    tokenizer without an end-of-sequence token to pad with.
    """
    return BACKBONES.build(config, head=head, seed=seed)


@BACKBONES.register("pretrained", PretrainedConfig)
def _load_from_config(config: PretrainedConfig, *, head: Head | None = None, seed: int = 0) -> Backbone:
    return load_pretrained(config.path, config, revision=config.revision, head=head, seed=seed)


def load_pretrained(
    path: str,
    config: Placement,
    *,
    revision: str | None = None,
    label: str | None = None,
    head: Head | None = None,
    seed: int = 0,
) -> Backbone:
    """The model at `path`, a folder or a Hub id, on `config.device` in `config.dtype`, called `label` on cards."""
    device = resolve_device(config.device)
    folder = _local_folder(path)
    if folder is not None and revision is not None:
        raise ValueError(f"backbone.revision={revision}: {path} is a folder, which has no revisions: leave it null")
    source = path if folder is None else str(folder)
    bits = getattr(config, "bits", None)
    if folder is not None:
        check_room(folder, config.dtype, device, bits)
    packing = {} if bits is None else loading_options(bits, config.dtype, device)
    tokenizer = _read_tokenizer(source, revision)
    with seeded(seed):
        model = _read_model(source, config, revision, packing, head)
    if head is not None:
        check_padding(tokenizer, model, getattr(config, "head", "native"), source)
    _set_padding(tokenizer, source)
    model = model.requires_grad_(False).eval()
    if not packing:  # packed weights are where they belong
        torch.nn.Module.to(model, device)
    name = label or (path if folder is None else folder.resolve().name)
    commit = getattr(model.config, "_commit_hash", None) if folder is None else None
    return as_backbone(model, tokenizer, name, revision=commit, head=head)


def as_backbone(
    model: PreTrainedModel, tokenizer: Any, name: str, *, revision: str | None = None, head: Head | None = None
) -> Backbone:
    """A frozen model and its tokenizer as a backbone."""
    added, pooler = (), None
    if head is not None:
        added, pooler = head_modules(model), pooler_of(model)
        model.config.use_cache = False  # whole texts are read once
        if model.dtype in (torch.float16, torch.bfloat16):
            in_float32(model, [*added, *([pooler] if pooler else [])])
    left_out = tuple(f"{path}." for path in (*added, f"{model.base_model_prefix}.pooler")) if added else ()
    return Backbone(model, tokenizer, name, revision, shapes_digest(model, left_out), head, added, pooler)


def _local_folder(path: str) -> Path | None:
    """`path` as a folder with a model, or None if it is a Hub id; ValueError if it can be neither."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"backbone.path={path}: is a file; name the folder that holds config.json and the weights")
        if HUB_ID.fullmatch(path):
            return None
        raise ValueError(f"backbone.path={path}: no such folder, and not a Hub id such as user/model")
    if not (folder / "config.json").is_file():
        raise ValueError(f"backbone.path={path}: the folder has no config.json, so it is not a transformers model")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"backbone.path={path}: the folder has no *.safetensors; weights in other formats may hold code and are "
            "not read: convert them with transformers' save_pretrained"
        )
    return folder


def _read_model(
    source: str, config: Any, revision: str | None, packing: dict[str, Any], head: Head | None
) -> PreTrainedModel:
    options = {"dtype": config.dtype if config.dtype == "auto" else getattr(torch, config.dtype), **packing}
    auto: Any = AutoModelForCausalLM
    if head is not None:
        auto, options = class_for(config.head), {**options, **options_for(config.head, head)}
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    try:
        with _quiet():
            loaded: Any = auto.from_pretrained(
                source, revision=revision, use_safetensors=True, output_loading_info=True, **options
            )
    except SafetensorError as error:
        raise ValueError(f"backbone {source}: the weights are damaged: {error}") from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"backbone {source}: cannot be loaded: {_first_lines(error)}") from error
    model, seen = loaded
    made: tuple[str, ...] = ()
    if head is not None:
        pooler = f"{model.base_model_prefix}.pooler"
        made = ("pooler",) if config.head == "linear" else (*head_modules(model), pooler)
    missing = sorted(key for key in seen["missing_keys"] if not key.startswith(tuple(f"{path}." for path in made)))
    if missing:
        raise ValueError(
            f"backbone {source}: the files lack {len(missing)} weights of a {type(model).__name__}, "
            f"first {missing[0]}: is it a causal language model, and complete?"
        )
    return model if head is None else with_head(model, config.head, config.pooling, head)


def _read_tokenizer(source: str, revision: str | None) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"backbone {source}: its tokenizer cannot be loaded: {_first_lines(error)}") from error
    return tokenizer


def _set_padding(tokenizer: Any, source: str) -> None:
    """The end-of-sequence token pads where nothing else does."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"backbone {source}: its tokenizer has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token


def _first_lines(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its bar of loaded weights and its report of missing ones, which is checked here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def shapes_digest(model: torch.nn.Module, left_out: tuple[str, ...] = ()) -> str:
    """sha256 (hex) over the sorted lines `name d1xd2…` of the model's parameters, as they are when not packed.

    Names that start as one of `left_out` are not among them.
    """
    named = [(name, p) for name, p in model.named_parameters() if not left_out or not name.startswith(left_out)]
    lines = sorted(f"{name} {'x'.join(map(str, whole_shape(p)))}\n" for name, p in named)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def resolve_device(name: str) -> torch.device:
    """The device `auto` (the accelerator if there is one), `cpu`, `cuda`, `cuda:1`, `mps` …; ValueError if absent."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    if not re.fullmatch(r"[a-z]+(:\d+)?", name):
        raise ValueError(f"device={name}: not a device; use auto, cpu, cuda, cuda:1 or mps")
    kind, _, index = name.partition(":")
    if kind == "cpu" and not int(index or 0):
        return torch.device(name)
    count = torch.accelerator.device_count() if accelerator is not None and accelerator.type == kind else 0
    if int(index or 0) >= count:
        here = ["cpu"]
        if accelerator is not None:
            here += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
        raise ValueError(f"device={name}: no such device here (known: {', '.join(here)}); use device=auto")
    return torch.device(name)
