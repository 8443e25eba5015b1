"""The settings in PEFT's `adapter_config.json`: each is checked, and what cannot be followed is refused with a reason.

Only what changes the trained adapter's result matters; how it was found or started is dropped, with a notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from mole.adapters.peft_patterns import PatternTable, is_plain
from mole.adapters.peft_tensors import MAX_RANK
from mole.untrusted import Damaged, Refused, shown, strict_json

MAX_CONFIG_BYTES = 1 << 20
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
BIASES = ("none", "all", "lora_only")

# Starts of A that leave the backbone as it is.
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# Starts that change the backbone's own weights too, by the beginning of their name.
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Keys that say nothing about what the trained adapter computes, whatever their value.
_WITHOUT_EFFECT = {
    *("auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config"),
}
# Always set; not worth a notice.
_UNREMARKABLE = {"auto_mapping", "inference_mode", "megatron_core", "peft_version", "qalora_group_size"}
_REASONS = {
    "target_parameters": "it adapts parameters inside a module (stacked experts), which are used without a call",
    "trainable_token_indices": "it replaces single rows of the embedding, which no gate can weigh",
    "layer_replication": "it belongs to a backbone with repeated blocks",
    "ensure_weight_tying": "tied copies of an adapted module would each need the adapter; save it without tying",
    "alora_invocation_tokens": "an aLoRA acts only after its invocation tokens",
    "use_qalora": "a QA-LoRA reads pooled inputs",
    "arrow_config": "it is a router over other adapters: give these as experts, with router=arrow",
    "megatron_config": "it adapts Megatron's parallel layers",
}


def read_settings(config: bytes, what: str) -> tuple[dict[str, Any], list[str]]:
    """The checked settings of a config, missing ones filled in, and notices about what is dropped.

    Raises Damaged for what is no config, Refused for a setting that cannot be followed.
    """
    given = strict_json(config, what, max_bytes=MAX_CONFIG_BYTES, max_depth=6)
    if not isinstance(given, dict):
        raise Damaged(f"{what}: not an object")
    if given.get("peft_type") != "LORA":
        raise Refused(f"{what}: peft_type is {shown(given.get('peft_type'))}; known: LORA")
    settings = {**_DEFAULTS, **given}
    for key, check in _CHECKS.items():
        if problem := check(settings[key]):
            raise Refused(f"{what}: {key} {problem}, got {shown(settings[key])}")
    if settings["use_dora"] and settings["lora_bias"]:
        raise Refused(f"{what}: use_dora and lora_bias exclude each other")
    notices = []
    for key in sorted(set(given) - set(_CHECKS) - {"peft_type", "rank_pattern", "alpha_pattern"}):
        if key in _WITHOUT_EFFECT:
            if given[key] and key not in _UNREMARKABLE:
                notices.append(f"{key} is dropped: the tensors tell which modules are adapted; it cannot change them")
        elif given[key] not in (None, False, 0, "", [], {}):
            reason = _REASONS.get(key, "mole does not know how to follow it")
            raise Refused(f"{what}: {key} is set to {shown(given[key])}: {reason}")
    return settings, notices


def read_plain_settings(config: bytes, what: str, known: Collection[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """The settings of a config of one of the methods `known`, by PEFT's words, and notices; None: it is another's.

    Raises Damaged for what is no config, Refused for a setting that cannot be followed.
    """
    given = strict_json(config, what, max_bytes=MAX_CONFIG_BYTES, max_depth=6)
    if not isinstance(given, dict) or given.get("peft_type") not in known:
        return None, []
    settings = {"task_type": None, "base_model_name_or_path": None, **given}
    settings.setdefault("modules_to_save", None)
    checks = {"task_type": _CHECKS["task_type"], "base_model_name_or_path": _name_or_null, "modules_to_save": _names}
    for key, check in checks.items():
        if problem := check(settings[key]):
            raise Refused(f"{what}: {key} {problem}, got {shown(settings[key])}")
    odd = sorted(set(given) - _PLAIN_KEYS)
    for key in odd:
        if given[key] not in (None, False, 0, "", [], {}):
            raise Refused(f"{what}: {key} is set to {shown(given[key])}: mole does not know how to follow it")
    return settings, []


# Keys of other methods than LoRA that are read, or say nothing about what the trained adapter computes.
_PLAIN_KEYS = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "feedforward_modules"),
    *("encoder_hidden_size", "inference_mode", "init_ia3_weights", "init_weights", "modules_to_save"),
    *("num_attention_heads", "num_layers"),
    *("num_transformer_submodules", "num_virtual_tokens", "peft_type", "peft_version", "prefix_projection"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "revision", "target_modules", "task_type", "token_dim"),
    *("tokenizer_kwargs", "tokenizer_name_or_path"),
}


def plain_targets(settings: dict[str, Any], paths: list[str]) -> tuple[str, ...]:
    """The config's target names, if they find each adapted module and nothing narrows them further; else ()."""
    targets = settings["target_modules"]
    narrowed = settings["exclude_modules"] or settings["layers_to_transform"] is not None
    if narrowed or not isinstance(targets, list) or not all(is_plain(target) for target in targets):
        return ()
    used = {target for target in targets for path in paths if path == target or path.endswith(f".{target}")}
    covered = all(any(path == t or path.endswith(f".{t}") for t in used) for path in paths)
    return tuple(sorted(used)) if covered and used == set(targets) else ()


def patterns(settings: dict[str, Any], key: str, where: str) -> PatternTable:
    """The table of `rank_pattern` or `alpha_pattern`. Raises Refused for a value that is none."""
    given, check = settings[key] or {}, _rank if key == "rank_pattern" else _alpha
    if not isinstance(given, dict):
        raise Refused(f"{where}: {key} is not an object")
    for name, value in given.items():
        if problem := check(value):
            raise Refused(f"{where}: {key}[{shown(name)}] {problem}, got {shown(value)}")
    return PatternTable(given)


def _rank(value: Any) -> str | None:
    return None if type(value) is int and 1 <= value <= MAX_RANK else f"must be a whole number from 1 to {MAX_RANK}"


def _alpha(value: Any) -> str | None:
    good = type(value) in (int, float) and math.isfinite(value) and 0 < value <= 1e9
    return None if good else "must be a number above 0, at most 1e9"


def _dropout(value: Any) -> str | None:
    return None if type(value) in (int, float) and 0 <= value < 1 else "must be a number from 0 to below 1"


def _flag(value: Any) -> str | None:
    return None if type(value) is bool else "must be true or false"


def _name_or_null(value: Any) -> str | None:
    return None if value is None or (isinstance(value, str) and len(value) <= 1000) else "must be text or null"


def _targets(value: Any) -> str | None:
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, list) and texts and all(isinstance(text, str) and 0 < len(text) <= 1000 for text in texts)
    return None if good else "must be text or a list of names"


def _names(value: Any) -> str | None:
    names = [] if value is None else value
    good = isinstance(names, list) and len(names) <= 64 and all(isinstance(v, str) and is_plain(v) for v in names)
    return None if good else "must be null or a list of at most 64 plain names"


def _start(value: Any) -> str | None:
    if isinstance(value, str) and value.lower().startswith(_CHANGING_STARTS):
        return (
            "changes the backbone's own weights too, so the adapter belongs to that changed backbone: "
            "convert it to a plain LoRA with PEFT first (path_initial_model_for_weight_conversion)"
        )
    return _one_of(*_HARMLESS_STARTS)(value)


def _one_of(*known: Any) -> Callable[[Any], str | None]:
    return lambda value: (
        None if any(value is k or value == k for k in known) else f"must be one of {', '.join(map(str, known))}"
    )


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "r": _rank,
    "lora_alpha": _alpha,
    "lora_dropout": _dropout,
    "target_modules": _targets,
    "use_rslora": _flag,
    "fan_in_fan_out": _flag,
    "use_dora": _flag,
    "bias": _one_of(*BIASES),
    "lora_bias": _flag,
    "modules_to_save": _names,
    "init_lora_weights": _start,
    "task_type": _one_of(None, *TASK_TYPES),
    "base_model_name_or_path": _name_or_null,
}
_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": None,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "task_type": None,
    "base_model_name_or_path": None,
    "rank_pattern": None,
    "alpha_pattern": None,
    "exclude_modules": None,
    "layers_to_transform": None,
}
