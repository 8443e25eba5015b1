"""Tiny random backbones of many families, experts made and saved by PEFT on them, and the mixture as plain hooks."""

import copy
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field

import peft
import torch
import transformers as t

from mole.adapters import peft_format
from mole.mixtures import MultiExpertModel
from mole.routers import XLoraConfig

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXT = {"vocab_size": 51, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
GROUPED = {**SIZES, **TEXT, "num_key_value_heads": 1, "head_dim": 8}
VISION = {"image_size": 8, "patch_size": 4, "num_labels": 3, "initializer_range": 0.3}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2} | {
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "init_std": 0.3,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
GEMMA = {**GROUPED, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


@dataclass
class Family:
    """How a backbone is made, and what PEFT is told for each of its three experts."""

    build: object
    config: object
    settings: list = field(default_factory=list)
    inputs: str = "text"


def lora(*targets, **more):
    return {"target_modules": list(targets), **more}


FAMILIES = {
    "llama": Family(
        t.LlamaForCausalLM,
        lambda: t.LlamaConfig(**GROUPED),
        [
            lora("q_proj", "v_proj", use_dora=True),
            lora("v_proj", "down_proj", "lm_head", "embed_tokens"),
            lora("q_proj", "lm_head", use_rslora=True),
        ],
    ),
    "gpt2": Family(
        t.GPT2LMHeadModel,
        lambda: t.GPT2Config(**GPT2, **TEXT),
        [
            lora("c_attn", "wte", "wpe", fan_in_fan_out=True),
            lora("c_attn", "c_fc", use_dora=True, bias="all", fan_in_fan_out=True),
            lora("c_proj", bias="lora_only", lora_bias=True, fan_in_fan_out=True),
        ],
    ),
    "opt": Family(
        t.OPTForCausalLM,
        lambda: t.OPTConfig(
            **{**TEXT, "init_std": 0.3}, hidden_size=16, ffn_dim=24, num_attention_heads=2, num_hidden_layers=2
        ),
        [lora("q_proj", "fc1", lora_bias=True), lora("embed_tokens", "fc2"), lora("out_proj", "fc1", bias="all")],
    ),
    "qwen3": Family(
        t.Qwen3ForCausalLM,
        lambda: t.Qwen3Config(**GROUPED, tie_word_embeddings=True),
        [lora("q_proj", "lm_head"), lora("gate_proj", use_dora=True), lora("k_proj", "up_proj", lora_alpha=3)],
    ),
    "gemma3": Family(
        t.Gemma3ForCausalLM,
        lambda: t.Gemma3TextConfig(**GEMMA),
        [lora("embed_tokens", "q_proj"), lora("o_proj", use_rslora=True), lora("embed_tokens", "down_proj")],
    ),
    "mixtral": Family(
        t.MixtralForCausalLM,
        lambda: t.MixtralConfig(**GROUPED, num_local_experts=2),
        [lora("q_proj", "k_proj"), lora("v_proj", use_dora=True), lora("o_proj")],
    ),
    "bert": Family(
        t.BertForMaskedLM,
        lambda: t.BertConfig(**SIZES, **TEXT),
        [
            lora("query", "word_embeddings", "position_embeddings"),
            lora("value", bias="all"),
            lora("dense", lora_bias=True),
        ],
    ),
    "roberta classifies": Family(
        t.RobertaForSequenceClassification,
        lambda: t.RobertaConfig(**SIZES, **TEXT, num_labels=3),
        [lora("query", "classifier.dense"), lora("value", use_dora=True), lora("out_proj", "key", "query")],
    ),
    "bert classifies": Family(
        t.BertForSequenceClassification,
        lambda: t.BertConfig(**SIZES, **TEXT, num_labels=3),
        [lora("pooler.dense", "query"), lora("classifier", use_dora=True), lora("pooler.dense", lora_bias=True)],
    ),
    "llama classifies": Family(
        t.LlamaForSequenceClassification,
        lambda: t.LlamaConfig(**GROUPED, num_labels=3),
        [lora("q_proj", "score"), lora("v_proj", use_dora=True), lora("up_proj", "score")],
    ),
    "t5": Family(
        t.T5ForConditionalGeneration,
        lambda: t.T5Config(**T5, **{**TEXT, "initializer_factor": 6.0}),
        [lora("q", "k", "v"), lora("v", "wo", use_dora=True), lora("k", "wi", "embed_tokens", "lm_head")],
        "pairs",
    ),
    "bart": Family(
        t.BartForConditionalGeneration,
        lambda: t.BartConfig(**BART, **TEXT),
        [lora("q_proj", "k_proj"), lora("v_proj", "fc1", bias="lora_only"), lora("k_proj", "fc2", use_dora=True)],
        "pairs",
    ),
    "vit": Family(
        t.ViTForImageClassification,
        lambda: t.ViTConfig(**SIZES, **VISION),
        [
            lora("projection", "q_proj"),
            lora("v_proj", "classifier", use_dora=True),
            lora("fc1", "projection", lora_bias=True),
        ],
        "images",
    ),
}


def backbone(name):
    torch.manual_seed(0)
    model = FAMILIES[name].build(FAMILIES[name].config()).eval()
    for parameter in model.parameters():  # biases start at 0: nothing would be seen of them
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    if getattr(model, "generation_config", None):
        model.generation_config.pad_token_id = 0
    return model


def inputs(name, rows=2, length=7):
    """A batch whose second row is padded on the right."""
    generator = torch.Generator().manual_seed(1)
    if FAMILIES[name].inputs == "images":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 51, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, -2:], ids[1:, -2:] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    if FAMILIES[name].inputs == "pairs":
        found["decoder_input_ids"] = torch.randint(3, 51, (rows, 5), generator=generator)
    return found


def with_peft(model, seed, **settings):
    """PEFT's model on `model`, every trained tensor random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, peft.LoraConfig(r=2 + seed, **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return made


@dataclass
class Case:
    """A mixture of one family, the same backbone untouched, and PEFT's model of each expert."""

    name: str
    model: MultiExpertModel
    plain: object
    theirs: list
    adapters: dict
    inputs: dict


def case(name, folder, config=None, **options):
    """The three experts of a family, saved by PEFT under `folder` and read again."""
    plain, theirs, adapters = backbone(name), [], {}
    for index, settings in enumerate(FAMILIES[name].settings):
        theirs.append(with_peft(copy.deepcopy(plain), index, **settings))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs[-1].save_pretrained(folder / str(index))
        adapters[f"expert {index}"] = peft_format.read(folder / str(index))
    config = config or XLoraConfig(layerwise=True, depth=2, size=8, temperature=0.3)
    model = MultiExpertModel(copy.deepcopy(plain), adapters, config, **options).eval()
    generator = torch.Generator().manual_seed(9)
    for router in model.routers().values():
        for parameter in router.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return Case(name, model, plain, theirs, adapters, inputs(name))


@contextmanager
def hooked(plain, theirs, gates):
    """`plain` with y + Σ_e g_e (PEFT's module of expert e (x) − y) at each site of `gates`: site → a function of x and
    y that gives [..., E], to be multiplied with what the module gives."""
    handles = []

    def attach(site, gate):
        members = [model.get_submodule(f"base_model.model.{site}") for model in theirs]

        def hook(module, args, out):
            weights = gate(args[0], out)
            return out + sum(weights[..., e] * (member(*args) - out) for e, member in enumerate(members))

        handles.append(plain.get_submodule(site).register_forward_hook(hook))

    for site, gate in gates.items():
        attach(site, gate)
    try:
        yield plain
    finally:
        for handle in handles:
            handle.remove()
