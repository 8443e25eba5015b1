"""The models that scripts/benchmarks/xlora.py measures: one backbone, E experts, one router, in mole and in PEFT."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mole.adapters import Adapter, LoraWeights
from mole.mixtures import MultiExpertModel
from mole.routers import XLoraConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setting:
    """What is measured: a Llama of `layers` blocks, and X-LoRA on its seven linear modules per block."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    experts: int = 8
    rank: int = 16
    layerwise: bool = True
    depth: int = 2
    size: int = 256


# Both are X-LoRA's usual shape scaled down: R / d is 0.25 to 1 here, far above what large backbones have.
MIXED = Setting(layers=6, hidden=384, intermediate=1024, vocabulary=32000, heads=6)
TRAINED = Setting(layers=4, hidden=256, intermediate=688, vocabulary=4096, heads=4)


def llama(setting: Setting, use_cache: bool = True) -> LlamaForCausalLM:
    """The backbone, the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        max_position_embeddings=2048,
        use_cache=use_cache,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def random_experts(setting: Setting, backbone: LlamaForCausalLM) -> dict[str, Adapter]:
    """Experts "0" to "n-1": PEFT's X-LoRA knows no other names."""
    found = {}
    for index in range(setting.experts):
        generator = torch.Generator().manual_seed(index)
        modules = {}
        for path, module in backbone.named_modules():
            if path.endswith(tuple(TARGETS)):
                a = torch.randn(setting.rank, module.in_features, generator=generator) * 0.02
                b = torch.randn(module.out_features, setting.rank, generator=generator) * 0.02
                modules[path] = LoraWeights(A=a, B=b, alpha=2.0 * setting.rank)
        found[str(index)] = Adapter(method="lora", modules=modules, targets=tuple(TARGETS))
    return found


def in_mole(setting: Setting, **options) -> MultiExpertModel:
    """The mixture as mole builds it; only the router trains."""
    backbone = llama(setting)
    config = XLoraConfig(layerwise=setting.layerwise, depth=setting.depth, size=setting.size, dropout=0.0)
    return MultiExpertModel(backbone, random_experts(setting, backbone), config, **options).eval()


def in_peft(setting: Setting, mine: MultiExpertModel):
    """The same in PEFT, with the experts and the router of `mine`."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = {}
        for name, adapter in mine.adapters().items():
            folders[name] = Path(root, name)
            lora = peft.LoraConfig(
                r=setting.rank, lora_alpha=2 * setting.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
            )
            lora.save_pretrained(folders[name])
            tensors = {
                f"base_model.model.{path}.lora_{factor}.weight": tensor.contiguous()
                for path, weights in adapter.modules.items()
                for factor, tensor in weights.tensors().items()
            }
            save_file(tensors, folders[name] / "adapter_model.safetensors")
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=setting.hidden,
            adapters={name: str(folder) for name, folder in folders.items()},
            layerwise_scalings=setting.layerwise,
            xlora_depth=setting.depth,
            xlora_size=setting.size,
            xlora_dropout_p=0.0,
        )
        theirs = peft.get_peft_model(llama(setting, use_cache=False), config).eval()
    router = theirs.base_model.internal_xlora_classifier
    for own, other in zip(mine.router.parameters(), router.parameters(), strict=True):
        other.data.copy_(own.data)
    return theirs
