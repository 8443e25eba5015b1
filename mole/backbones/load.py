"""Load a pretrained causal language model from a folder or the Hub, frozen, with its tokenizer."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mole.registry import BACKBONES, config_dataclass

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


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
    """Any causal language model in transformers' format."""

    name: Literal["pretrained"] = "pretrained"
    path: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    attention: Attention = "auto"


@dataclass(frozen=True)
class Backbone:
    """A frozen model in eval mode with its tokenizer.

    `name` is the label that cards carry: a Hub id, or a folder's name. `revision` is the Hub commit, if there is one.
    `shapes` is the sha256 over the sorted `name shape` lines of the parameters: it tells backbones apart without
    their weights.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    revision: str | None
    shapes: str

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can take, if its config says so."""
        return getattr(self.model.config, "max_position_embeddings", None)


def load(config: Any) -> Backbone:
    """The backbone that `config.name` names.

    Raises ValueError for a device that is not there, a path that is neither a folder with a model nor a Hub id, a
    damaged file, missing weights, or a tokenizer without an end-of-sequence token to pad with.
    """
    return BACKBONES.build(config)


@BACKBONES.register("pretrained", PretrainedConfig)
def _load_from_config(config: PretrainedConfig) -> Backbone:
    return load_pretrained(config.path, config, revision=config.revision)


def load_pretrained(path: str, config: Placement, *, revision: str | None = None, label: str | None = None) -> Backbone:
    """The model at `path`, a folder or a Hub id, on `config.device` in `config.dtype`."""
    device = resolve_device(config.device)
    folder = Path(path).expanduser()
    is_folder = folder.is_dir()
    source = str(folder) if is_folder else path
    options: dict[str, Any] = {"dtype": config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)}
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    model = AutoModelForCausalLM.from_pretrained(source, revision=revision, use_safetensors=True, **options)
    model.requires_grad_(False).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    commit = getattr(model.config, "_commit_hash", None)
    name = label or (folder.resolve().name if is_folder else path)
    return Backbone(model, tokenizer, name, None if is_folder else commit, shapes_digest(model))


def shapes_digest(model: torch.nn.Module) -> str:
    """sha256 (hex) over the sorted lines `name d1xd2…` of the model's parameters."""
    lines = sorted(f"{name} {'x'.join(map(str, p.shape))}\n" for name, p in model.named_parameters())
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
