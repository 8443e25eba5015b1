"""A small random Llama, experts that differ in everything, and mixtures of them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mole.adapters import Adapter, LoraWeights
from mole.mixtures import MultiExpertModel
from mole.routers import TaskConfig, TopKConfig, UniformConfig, XLoraConfig

TASKS = {"sums": ("add",), "words": ("spell", "upper"), "dates": ("date",)}


def llama(dtype=torch.float32, **options) -> LlamaForCausalLM:
    """2 blocks, width 32, vocabulary 101; weights large enough that logits are about 6 in size."""
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


def expert(model, modules, *, rank, alpha, rslora=False, seed=0, dtype=torch.float32) -> Adapter:
    """A random LoRA on the modules whose path ends with one of `modules`."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for path, module in model.named_modules():
        if path.endswith(tuple(modules)):
            a = torch.randn(rank, module.in_features, generator=generator, dtype=dtype) * 0.3
            b = torch.randn(module.out_features, rank, generator=generator, dtype=dtype) * 0.3
            weights[path] = LoraWeights(A=a, B=b, alpha=alpha, rslora=rslora)
    return Adapter(method="lora", modules=weights, dropout=0.0)


def three_experts(model, dtype=torch.float32) -> dict[str, Adapter]:
    """Ranks, alphas, scaling rules and targets all differ; only `v_proj` has all three."""
    return {
        "sums": expert(model, ["q_proj", "v_proj"], rank=2, alpha=4.0, seed=1, dtype=dtype),
        "words": expert(model, ["v_proj", "down_proj"], rank=4, alpha=2.0, rslora=True, seed=2, dtype=dtype),
        "dates": expert(model, ["v_proj", "q_proj", "up_proj"], rank=3, alpha=6.0, seed=3, dtype=dtype),
    }


CONFIGS = {
    "uniform": UniformConfig(),
    "task": TaskConfig(),
    "top_k": TopKConfig(),
    "top_k_all": TopKConfig(top_k=None),
    "xlora": XLoraConfig(),
    "xlora_layerwise": XLoraConfig(layerwise=True, depth=2, size=16, temperature=0.3),
    "xlora_top_k": XLoraConfig(top_k=2, depth=3, size=8),
    "xlora_top_k_softmax": XLoraConfig(top_k=2, top_k_softmax=True, softmax=False, layerwise=True),
    "xlora_scaling_pass": XLoraConfig(scaling_pass_value=0.7, global_scaling_weight=1.7, softmax=False),
}


def mixture(name: str, dtype=torch.float32, **options) -> MultiExpertModel:
    """The three experts on the small Llama under the router `CONFIGS[name]`, with a router that is not at its start."""
    model = llama(dtype)
    config = CONFIGS[name]
    if dtype == torch.float64 and hasattr(config, "dtype"):
        config = type(config)(**{**vars(config), "dtype": "float64"})
    built = MultiExpertModel(model, three_experts(model, dtype), config, tasks=TASKS, **options)
    generator = torch.Generator().manual_seed(7)
    for router in built.routers().values():
        if dtype == torch.float64:
            router.double()
        for parameter in router.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return built.eval()
