"""A small random Llama, expert folders that differ in everything, and X-LoRA models of them."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mole import xlora
from mole.adapters import Adapter, LoraWeights, peft_format

TARGETS = ("q_proj", "v_proj", "down_proj")
SITES = 2 * len(TARGETS)


def llama(dtype=torch.float32, **options) -> LlamaForCausalLM:
    """2 blocks, width 32, vocabulary 101; logits are about 6 in size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config.pad_token_id = 0
    return model


def lora(seed=0, *, rank=2, alpha=4.0, rslora=False, targets=TARGETS, dtype=torch.float32, model=None) -> Adapter:
    """A random LoRA on the modules whose path ends with one of `targets`."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, module in (model or llama()).named_modules():
        if path.endswith(tuple(targets)):
            a = torch.randn(rank, module.in_features, generator=generator) * 0.3
            b = torch.randn(module.out_features, rank, generator=generator) * 0.3
            modules[path] = LoraWeights(A=a.to(dtype), B=b.to(dtype), alpha=alpha, rslora=rslora)
    return Adapter(method="lora", modules=modules)


def write_expert(folder: Path, adapter: Adapter) -> str:
    """A PEFT folder of the expert; its path as text."""
    folder.mkdir(parents=True)
    peft_format.write(adapter, folder, None)
    return str(folder)


def write_experts(root: Path, names=("law", "code", "bio"), **options) -> dict[str, str]:
    """A folder for each name, below `root` as expert-in-0, …; ranks and alphas differ."""
    made = {}
    for index, name in enumerate(names):
        given = {"rank": 2 + index % 3, "alpha": 4.0 + index, "rslora": index % 2 == 1, **options}
        made[name] = write_expert(root / f"source-{index}", lora(index, **given))
    return made


def randomise(model: xlora.XLoraModel, seed=7) -> xlora.XLoraModel:
    """A router that is not at its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.router.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def build(adapters, base=None, **fields) -> xlora.XLoraModel:
    """An X-LoRA of these folders with a random router."""
    return randomise(xlora.add_xlora_to_model(base or llama(), xlora.xLoRAConfig(**fields), adapters))


def ids(rows=2, length=9, seed=5) -> torch.Tensor:
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens=None, **options) -> torch.Tensor:
    return model(input_ids=ids() if tokens is None else tokens, **options).logits
