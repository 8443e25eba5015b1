"""AdapterHub's folders: `adapter_config.json` with `config` and `model_type`, and `adapter.safetensors`.

Bottlenecks that read what their sub-layer gives (double_seq_bn, once houlsby), and LoRA. What reads something else
(seq_bn reads after the layer norm, par_bn the residual stream) is refused: mole's bottlenecks have no place for it yet.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mole.adapters.adapter import Adapter
from mole.adapters.bottleneck import ACTIVATIONS, BottleneckWeights
from mole.adapters.lora import LoraWeights
from mole.adapters.loralib_format import unmerged
from mole.untrusted import Damaged, Refused, safetensors_tensors, shown, strict_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"
HEAD = "head_config.json"
FUSION = "adapter_fusion_config.json"
MAX_CONFIG_BYTES = 1 << 20
UNRELIABLE_BEFORE = (1, 1, 0)  # versions whose stored scale of a LoRA is said to be wrong

# A name of a config in the place of its fields → whether it is one that can be followed.
_NAMED = {
    "double_seq_bn": {
        "mh_adapter": True,
        "output_adapter": True,
        "non_linearity": "swish",
        "original_ln_before": False,
    },
    "lora": {"architecture": "lora"},
}
_OLD = {"houlsby": "double_seq_bn", "pfeiffer": "seq_bn", "parallel": "par_bn", "scaled_parallel": "par_bn"}
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu", "tanh": "tanh"}
# What a field has to be for the formula that is followed: h + s (U σ(D h + b) + c).
_FIXED: dict[str, tuple[Any, ...]] = {
    "ln_before": (False,),
    "ln_after": (False,),
    "original_ln_before": (False,),
    "original_ln_after": (True,),
    "residual_before_ln": (True,),
    "adapter_residual_before_ln": (False,),
    "is_parallel": (False,),
    "use_gating": (False,),
    "phm_layer": (False,),
    "inv_adapter": (None,),
    "cross_adapter": (False,),
    "composition_mode": ("add",),
    "output_lora_only": (False,),
    "vera_d": (None,),
    "vera_b": (None,),
}
_WITHOUT_EFFECT = {
    *("architecture", "init_weights", "init_weights_vera", "dtype", "leave_out", "reduction_factor", "mh_adapter"),
    *("output_adapter", "non_linearity", "scaling", "dropout", "stochastic_depth", "r", "alpha", "attn_matrices"),
    *("selfattn_lora", "intermediate_lora", "output_lora", "inv_adapter_reduction_factor", "learn_phm", "phm_bias"),
    *("phm_c_init", "phm_dim", "phm_init_range", "phm_rank", "factorized_phm_W", "factorized_phm_rule"),
    *("hypercomplex_nonlinearity", "shared_W_phm", "shared_phm_rule"),
}
_PATH = r"((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)"
_PART = re.compile(rf"{_PATH}\.adapters\.([^.]+)\.(adapter_down\.0|adapter_up)\.(weight|bias)", re.ASCII)
_LORA = re.compile(rf"{_PATH}\.loras\.([^.]+)\.lora_(A|B)", re.ASCII)
_SHORT = {
    ("adapter_down.0", "weight"): "down",
    ("adapter_down.0", "bias"): "down_bias",
    ("adapter_up", "weight"): "up",
    ("adapter_up", "bias"): "up_bias",
}
# Kind of backbone → end of a path in the file, path of the module whose output the bottleneck reads.
_POST_NORM = {"attention.output": "attention.output.dense", "output": "output.dense"}
_GATED = {"attention_adapters": "self_attn.o_proj", "output_adapters": "mlp.down_proj"}
SITES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _POST_NORM),
    **dict.fromkeys(("llama", "mistral"), _GATED),
    "gpt2": {"attention_adapters": "attn.c_proj", "output_adapters": "mlp.c_proj"},
}


@dataclass(frozen=True)
class HubFolder:
    """What such a folder holds: the adapter, its backbone's name as text, its own name, the version that wrote it."""

    adapter: Adapter
    backbone: str | None
    name: str
    version: str | None


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Whether this is the config of such a folder."""
    return "peft_type" not in config and "config" in config and ("model_type" in config or "hidden_size" in config)


def parse(config: bytes, weights: bytes, where: str, *, alpha: float | None = None) -> HubFolder:
    """The adapter in the bytes of the two files; `where` names them in errors.

    `alpha` stands in for the stored scale of a LoRA, which is not trusted in folders of versions before 1.1.0. Raises
    Damaged, and Refused for what mole cannot follow, naming the field.
    """
    what = f"{where}/{CONFIG}"
    node = strict_json(config, what, max_bytes=MAX_CONFIG_BYTES, max_depth=6)
    if not isinstance(node, dict) or not is_adapterhub(node):
        raise Damaged(f"{what}: no config of AdapterHub: it has no config with model_type or hidden_size")
    fields = _fields(node["config"], what)
    kind, version = _text(node, "model_type", what), node.get("version")
    version = version if isinstance(version, str) else None
    tensors = safetensors_tensors(weights, f"{where}/{WEIGHTS}")
    if fields.get("architecture") == "lora":
        modules = _loras(fields, tensors, where, _alpha(fields, version, alpha, what))
        adapter = Adapter("lora", modules, dropout=_dropout(fields, what), fan_in_fan_out=kind == "gpt2")
    else:
        modules = _bottlenecks(fields, tensors, kind, where)
        adapter = Adapter("bottleneck", modules, dropout=_dropout(fields, what))
    backbone = node.get("model_name")
    return HubFolder(
        adapter, backbone if isinstance(backbone, str) and backbone else None, str(node.get("name") or ""), version
    )


def _fields(given: Any, what: str) -> dict[str, Any]:
    if isinstance(given, str):
        name = _OLD.get(given, given).partition("[")[0]
        if name not in _NAMED or "[" in given:
            raise Refused(f"{what}: config {shown(given)}: {_reason(name)}")
        given = _NAMED[name]
    if not isinstance(given, dict):
        raise Damaged(f"{what}: config is {shown(given)}")
    if given.get("architecture") not in (None, "lora"):
        raise Refused(f"{what}: architecture {shown(given['architecture'])}: bottlenecks and LoRA are read")
    for key, value in given.items():
        if key in _FIXED:
            # 0 == False and 1 == True, which a config may not mean
            if not any(value == good and type(value) is type(good) for good in _FIXED[key]):
                raise Refused(f"{what}: {key} is {shown(value)}: {_REASONS.get(key, _OTHER)}")
        elif key not in _WITHOUT_EFFECT and value not in (None, False, 0, "", [], {}):
            raise Refused(f"{what}: {key} is set to {shown(value)}: mole does not know how to follow it")
    return given


_READS_ELSEWHERE = "it reads other values than its sub-layer gives; only adapters like double_seq_bn (houlsby) are read"
_OTHER = "it computes something else than h + s (U σ(D h + b) + c)"
_REASONS = {
    "original_ln_before": _READS_ELSEWHERE,
    "is_parallel": _READS_ELSEWHERE,
    "residual_before_ln": _READS_ELSEWHERE,
    "composition_mode": "only LoRA's sum is read",
}


def _reason(name: str) -> str:
    return _READS_ELSEWHERE if name in ("seq_bn", "par_bn") else "mole does not know how to follow it"


def _bottlenecks(fields: dict[str, Any], tensors: dict[str, Tensor], kind: str, where: str) -> dict[str, Any]:
    if kind not in SITES:
        raise Refused(f"{where}: bottlenecks for model_type {shown(kind)}; known: {', '.join(sorted(SITES))}")
    activation = _ACTIVATIONS.get(str(fields.get("non_linearity")).lower())
    if activation not in ACTIVATIONS:
        raise Refused(f"{where}: non_linearity {shown(fields.get('non_linearity'))}; known: {', '.join(_ACTIVATIONS)}")
    scale = fields.get("scaling", 1.0)
    if type(scale) not in (int, float) or not 0 < scale <= 1e9:
        raise Refused(f"{where}: scaling is {shown(scale)}; only a number above 0 is followed")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor, match in _matched(tensors, _PART, where):
        path = _site(match[1], SITES[kind])
        if path is None:
            raise Refused(f"{where}: tensor {shown(key)} is at no place of a {kind}")
        found.setdefault(path, {})[_SHORT[match[3], match[4]]] = tensor
    return {path: _bottleneck(path, parts, activation, float(scale), where) for path, parts in found.items()}


def _bottleneck(path: str, parts: dict[str, Any], activation: str, scale: float, where: str) -> BottleneckWeights:
    if missing := sorted(set(_SHORT.values()) - set(parts)):
        raise Damaged(f"{where}: {path} has no tensor {missing[0]}")
    try:
        return BottleneckWeights(**parts, activation=activation, scale=scale)
    except ValueError as error:
        raise Damaged(f"{where}: {path}: {error}") from None


def _site(path: str, sites: Mapping[str, str]) -> str | None:
    for end, module in sites.items():  # attention.output before output
        if path.endswith(f".{end}"):
            return f"{path.removesuffix(end)}{module}"
    return None


def _loras(fields: dict[str, Any], tensors: dict[str, Tensor], where: str, alpha: float) -> dict[str, Any]:
    names = fields.get("attn_matrices", ["q", "v"])
    blocks = tuple(letter in names for letter in "qkv") if isinstance(names, list) else None
    found: dict[str, dict[str, Tensor]] = {}
    for _, tensor, match in _matched(tensors, _LORA, where):
        found.setdefault(match[1], {})[match[3]] = tensor
    modules = {}
    for path, parts in found.items():
        if missing := sorted({"A", "B"} - set(parts)):
            raise Damaged(f"{where}: {path} has no factor {missing[0]}")
        A, B = parts["A"], parts["B"]
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] % B.shape[1]:
            raise Damaged(f"{where}: {path} has factors of shapes {tuple(A.shape)} and {tuple(B.shape)}")
        rank, own = B.shape[1], fields.get("r", B.shape[1])
        if own != rank:
            raise Damaged(f"{where}: rank {rank} in the weights of {path}, {shown(own)} in {CONFIG}")
        if path.rsplit(".", 1)[-1] == "c_attn":
            A, B = unmerged(A, B, blocks, f"{where}: {path}")
        elif A.shape[0] != rank:
            raise Damaged(f"{where}: {path} has factors of shapes {tuple(A.shape)} and {tuple(B.shape)}")
        modules[path] = LoraWeights(A=A, B=B, alpha=alpha * A.shape[0] / rank)
    return modules


def _matched(tensors: dict[str, Tensor], pattern: re.Pattern[str], where: str) -> list[tuple[str, Tensor, re.Match]]:
    """Every tensor with its name taken apart. Raises Refused for another one, and for those of several adapters."""
    found = []
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            raise Refused(f"{where}: tensor {shown(key)} belongs to no place of this adapter")
        found.append((key, tensor, match))
    names = sorted({match[2] for _, _, match in found})
    if len(names) > 1:
        raise Refused(f"{where}: tensors of several adapters ({', '.join(names[:4])}); give the folder of one")
    if not found:
        raise Damaged(f"{where}: no tensor in it")
    return found


def _alpha(fields: dict[str, Any], version: str | None, given: float | None, what: str) -> float:
    if given is not None:
        return given
    if _version(version) < UNRELIABLE_BEFORE:
        raise Refused(
            f"{what}: written by {shown(version or 'an old version')}, whose stored scale of a LoRA is said to be "
            "wrong; say the one of the training with alpha=…"
        )
    alpha: Any = fields.get("alpha")
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or not 0 < alpha <= 1e9:
        raise Refused(f"{what}: alpha is {shown(alpha)}; a number above 0 is wanted")
    return float(alpha)


def _version(text: str | None) -> tuple[int, ...]:
    match = re.fullmatch(r"adapters\.(\d{1,4})\.(\d{1,4})\.(\d{1,4}).*", text or "", re.ASCII)
    return tuple(map(int, match.groups())) if match else (0,)


def _dropout(fields: dict[str, Any], what: str) -> float:
    value = fields.get("dropout", 0.0)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise Refused(f"{what}: dropout is {shown(value)}; a number from 0 to below 1 is wanted")
    return float(value)


def _text(node: Mapping[str, Any], key: str, what: str) -> str:
    value = node.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= 100:
        raise Refused(f"{what}: {key} is {shown(value)}; the kind of the backbone is wanted")
    return value


def dump(adapter: Adapter, name: str, backbone_name: str | None, model_type: str, width: int) -> dict[str, bytes]:
    """The two files, name → bytes, of bottlenecks for a backbone of that kind and width (features of hidden states).

    Raises ValueError for what the format, or this table of places, has no place for.
    """
    if adapter.method != "bottleneck":
        raise ValueError(f"format=adapterhub holds bottlenecks, this is a {adapter.method}: use format=peft")
    if model_type not in SITES:
        raise ValueError(f"format=adapterhub: no table of places for a {model_type}; known: {', '.join(sorted(SITES))}")
    places = {module: end for end, module in SITES[model_type].items()}
    tensors, kinds = {}, set()
    for path, part in adapter.modules.items():
        end = next((end for module, end in places.items() if path.endswith(f".{module}")), None)
        if end is None or part.reads != "output":
            raise ValueError(f"format=adapterhub has no place for the bottleneck at {path}, which reads {part.reads}")
        kinds.add((part.activation, part.scale, part.rank))
        home = f"{path.removesuffix(SITES[model_type][end])}{end}.adapters.{name}"
        for (layer, which), short in _SHORT.items():
            tensors[f"{home}.{layer}.{which}"] = getattr(part, short).detach().cpu().contiguous()
    if len(kinds) > 1:
        raise ValueError("format=adapterhub has one size, activation and scale for all bottlenecks of an adapter")
    ((activation, scale, size),) = kinds
    return {CONFIG: _config(name, backbone_name, model_type, width, (activation, scale, size)), WEIGHTS: save(tensors)}


def _config(name: str, backbone: str | None, model_type: str, width: int, kind: tuple[str, float, int]) -> bytes:
    activation, scale, size = kind
    spelled: Sequence[str] = [theirs for theirs, ours in _ACTIVATIONS.items() if ours == activation]
    if not spelled:
        raise ValueError(f"format=adapterhub has no activation {activation}")
    fields = {key: values[0] for key, values in _FIXED.items() if key not in ("composition_mode", "vera_d", "vera_b")}
    fields.pop("output_lora_only")
    own = {"mh_adapter": True, "output_adapter": True, "non_linearity": spelled[0], "reduction_factor": width / size}
    fields |= {**own, "scaling": float(scale), "dropout": 0.0, "init_weights": "bert", "leave_out": []}
    node = {
        "config": dict(sorted(fields.items())),
        "hidden_size": width,
        "model_name": backbone,
        "model_type": model_type,
        "name": name,
        "version": "adapters.1.1.0",
    }
    return (json.dumps(node, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
