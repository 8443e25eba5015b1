"""PEFT's X-LoRA layout: adapter_config.json of type XLORA and the router in adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mole.adapters import peft_format
from mole.xlora import router_files
from mole.xlora.card import ExpertRow

if TYPE_CHECKING:
    from mole.xlora.model import XLoraModel

# What PEFT's XLoraConfig knows beside `adapters`.
FIELDS = (
    "hidden_size",
    "enable_softmax",
    "enable_softmax_topk",
    "layerwise_scalings",
    "xlora_depth",
    "xlora_size",
    "xlora_dropout_p",
    "use_trainable_adapters",
    "softmax_temperature",
    "top_k_lora",
    "scaling_pass_value",
    "global_scaling_weight",
)


def obstacle(model: XLoraModel, experts: str) -> str | None:
    """Why PEFT cannot load this model with equal results; None if it can."""
    config = model.xlora_config
    if not config.enable_relu_and_dropout and config.xlora_depth > 1:
        return "its router always has ReLU between layers, this one has none (enable_relu_and_dropout=False)"
    if not config.scaling_pass_topk and config.top_k_lora is not None and config.scaling_pass_value:
        return "it has no first pass without top-k (scaling_pass_topk=False)"
    if config.router_dtype != "float32":
        return f"its router has the base model's dtype, this one is {config.router_dtype}"
    if config.modules_to_save not in ("error", "base"):
        return f"it has no modules_to_save in X-LoRA (modules_to_save={config.modules_to_save!r})"
    for path in model.sites:
        if not path.startswith("model."):
            return f"it renames tensors of modules whose path does not begin with 'model.', such as {path}"
    if not _plain(model):
        return "its X-LoRA takes plain LoRA experts only"
    if experts == "reference" and any(not Path(e.source or "").is_dir() for e in model.sources.values()):
        return "it needs a folder for every expert"
    return None


def _plain(model: XLoraModel) -> bool:
    """Whether every expert is made of low-rank factors and nothing else."""
    return all(
        not adapter.biases
        and not adapter.full_modules
        and all(set(weights.tensors()) == {"A", "B"} for weights in adapter.modules.values())
        for adapter in model.adapters().values()
    )


def files(
    model: XLoraModel, folder: Path, rows: tuple[ExpertRow, ...], layers: router_files.Layers
) -> dict[str, bytes]:
    """The two files. Paths of experts are absolute: PEFT looks for them from the reader's working directory."""
    places = [str((folder / row.folder).resolve()) if row.folder else row.source for row in rows]
    config = {name: getattr(model.xlora_config, name) for name in FIELDS}
    config |= {
        "adapters": {str(index): place for index, place in enumerate(places)},
        "base_model_name_or_path": model.xlora_config.base_model_id or model.backbone.config.name_or_path or None,
        "inference_mode": True,
        "peft_type": "XLORA",
        "task_type": model.xlora_config.task_type or _task_type(model),
    }
    return {
        peft_format.CONFIG: (json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n").encode(),
        peft_format.WEIGHTS: router_files.dump_peft(layers, model.xlora_config),
    }


def _task_type(model: XLoraModel) -> str | None:
    name = type(model.backbone).__name__
    ends = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    return next((task for end, task in ends.items() if name.endswith(end)), None)
