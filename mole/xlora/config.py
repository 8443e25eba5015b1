"""xLoRAConfig: X-LoRA's configuration under its historic field names, checked when it is made and when it is used."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from mole.registry import nearest
from mole.routers import XLoraConfig as RouterConfig
from mole.xlora.config_checks import PEFT_FIELDS, problems

Place = str | os.PathLike[str] | tuple[str, str]


@dataclass(init=False)
class xLoRAConfig:
    """Everything that X-LoRA can be told; every field has the meaning and the default of the original.

    Positional arguments: `hidden_size` first, then by type: a device, another string is `base_model_id`, a dict is
    `adapters`. A field may be assigned later; it acts, and is checked again, at the next forward and when saving.
    Raises ValueError naming each field, what it got, what it needs and the way out.

    `adapters` name → folder, Hub id, `org/repo/sub/folder` or (id, sub-folder), in the order of the gates; any names.
    """

    hidden_size: int | None = None
    base_model_id: str | None = None
    device: Any = None
    adapters: Any = None
    enable_softmax: bool = True
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    enable_relu_and_dropout: bool = True
    use_bias: bool = True
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    scaling_pass_value: float | None = 0.0
    global_scaling_weight: float = 1.0
    stop_token_id: int | None = None
    router_dtype: str = "float32"
    scaling_pass_topk: bool = True
    scaling_pass_dropout: bool = False
    expert_dropout: str = "auto"
    expert_dtype: str = "auto"
    kernel: str = "auto"
    modules_to_save: str = "error"
    pooled_gate: str = "auto"
    gate_lora_bias: bool = True
    gate_refresh: int = 1
    gate_freeze_after: int | None = None
    task_type: str | None = None

    def __init__(self, *args: Any, **fields: Any):
        given = {**_by_place(args, fields), **fields}
        names = [f.name for f in dataclasses.fields(self)]
        unknown = [name for name in given if name not in names and name not in PEFT_FIELDS]
        if unknown:
            raise ValueError("; ".join(_unknown(name, names) for name in unknown))
        if given.get("base_model_id") is None and given.get("base_model_name_or_path"):  # PEFT writes "" for none
            given["base_model_id"] = given["base_model_name_or_path"]
        for one in dataclasses.fields(self):
            setattr(self, one.name, given.get(one.name, one.default))
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "changed":
            object.__setattr__(self, name, value)
            return
        if name not in _NAMES:
            raise AttributeError(_unknown(name, list(_NAMES)))
        if name in _FLOATS and type(value) is int:
            value = float(value)
        object.__setattr__(self, name, _plain(value))
        object.__setattr__(self, "changed", True)

    changed = True  # since the model that it belongs to has last followed it

    def check(self, **facts: int) -> None:
        """Raises ValueError with a line for each field that is not valid; `experts` and `hidden` are known at build."""
        found = problems(self, **facts)
        if found:
            raise ValueError("\n".join(found))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data; the device as text."""
        found = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {**found, "device": None if self.device is None else str(self.device)}

    def router(self) -> RouterConfig:
        """What the router is built from: the same settings under the names that all of mole's routers share."""
        value = self.scaling_pass_value
        assert value is not None, "None is replaced by 1/experts before the router is built"
        return RouterConfig(
            depth=self.xlora_depth,
            size=self.xlora_size,
            bias=self.use_bias,
            relu_and_dropout=self.enable_relu_and_dropout,
            dropout=self.xlora_dropout_p,
            layerwise=self.layerwise_scalings,
            softmax=self.enable_softmax,
            temperature=self.softmax_temperature,
            top_k=self.top_k_lora,
            top_k_softmax=self.enable_softmax_topk,
            scaling_pass_value=value,
            scaling_pass_top_k=self.scaling_pass_topk,
            global_scaling_weight=self.global_scaling_weight,
            dtype=self.router_dtype,  # type: ignore[arg-type]  checked above
            gate_refresh=self.gate_refresh,
            gate_freeze_after=self.gate_freeze_after,
        )

    @classmethod
    def of(cls, config: Any) -> xLoRAConfig:
        """`config` itself, or made of a mapping (a Hydra node too) or of PEFT's XLoraConfig."""
        if isinstance(config, cls):
            return config
        if hasattr(config, "peft_type") and hasattr(config, "to_dict"):
            fields = {k: v for k, v in config.to_dict().items() if k not in PEFT_FIELDS or v is not None}
            subfolders = getattr(config, "_subfolders", None)
            if subfolders:
                pairs = zip(fields["adapters"].items(), subfolders, strict=True)
                fields["adapters"] = {name: (place, sub) if sub else place for (name, place), sub in pairs}
            return cls(**fields)
        plain = _plain(config)
        if isinstance(plain, dict):
            return cls(**plain)
        raise ValueError(f"xlora_config: got {type(config).__name__}, need an xLoRAConfig, PEFT's, or a mapping")


XLoraConfig = xLoRAConfig
_NAMES = tuple(one.name for one in dataclasses.fields(xLoRAConfig))
_FLOATS = ("softmax_temperature", "xlora_dropout_p", "scaling_pass_value", "global_scaling_weight")


def is_device(value: Any) -> bool:
    """Whether `value` is a torch.device, or text that names one."""
    if isinstance(value, torch.device):
        return True
    if not isinstance(value, str):
        return False
    try:
        torch.device(value)
    except RuntimeError:
        return False
    return True


def _by_place(args: tuple, fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index, value in enumerate(args):
        if index == 0:
            name = "hidden_size"
        elif is_device(value):
            name = "device"
        elif isinstance(value, str):
            name = "base_model_id"
        elif isinstance(value, Mapping):
            name = "adapters"
        elif value is None:
            continue
        else:
            raise TypeError(
                f"xLoRAConfig: positional argument {index + 1} is a {type(value).__name__}; after hidden_size come a "
                "device, the base model's id and a dict of adapters; give the others by name"
            )
        if name in found or name in fields:
            raise TypeError(f"xLoRAConfig: {name} was given twice")
        found[name] = value
    return found


def _unknown(name: str, known: list[str]) -> str:
    near = nearest(name, known, 1)
    return f"{name}: no such field of xLoRAConfig{f'; did you mean {near[0]}?' if near else ''}"


def _plain(value: Any) -> Any:
    """Mappings and lists (Hydra's too) as plain ones."""
    if type(value).__module__.startswith("omegaconf."):
        from omegaconf import OmegaConf

        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, list) else value
