"""Prefixes and prompts equal PEFT's on decoders of many families: rotations of all sorts, learned positions, ALiBi."""

import copy
import warnings

import peft
import pytest
import torch
import transformers as t

from mole.adapters import PrefixConfig, attach, attach_weights, layers, peft_format

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXT = {"vocab_size": 51, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
PLAIN = {**SIZES, **TEXT}
GROUPED = {**PLAIN, "num_key_value_heads": 1, "head_dim": 8}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
OPT = {"vocab_size": 51, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 24}
FAMILIES = {
    "llama eager": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, attn_implementation="eager")),
    "llama yarn": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**GROUPED, rope_parameters=YARN, max_position_embeddings=128)
    ),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED)),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**PLAIN)),
    "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**PLAIN)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED, **LAYERS)),
    "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**PLAIN, logit_scale=1.0)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=2)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**OPT, init_std=0.3, word_embed_proj_dim=16)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=51, hidden_size=16, n_layer=2, n_head=2)),
}
WITHOUT_ROTATION = ("opt", "bloom")


def built(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def peft_on(model, config, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(2)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
        made.save_pretrained(folder)
    return made


CONFIGS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
CASES = [(f, m) for f in FAMILIES for m in CONFIGS if m == "prompt" or f not in WITHOUT_ROTATION]


@pytest.mark.parametrize(("family", "method"), CASES, ids=lambda word: word)
def test_a_folder_of_peft_gives_its_logits_on_every_family(family, method, tmp_path):
    plain = built(family)
    config = CONFIGS[method](task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft_on(copy.deepcopy(plain), config, tmp_path)
    ids = torch.randint(3, 51, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        want = theirs(input_ids=ids, attention_mask=mask).logits[:, -7:]
        before = plain(ids, attention_mask=mask).logits
    attach_weights(plain, peft_format.read(tmp_path))
    with torch.no_grad():
        got = plain(ids, attention_mask=mask).logits
    assert (got - want)[mask.bool()].abs().max() <= 1e-5 * want.abs().max()
    assert (before - want)[mask.bool()].abs().max() > 1e-3 * want.abs().max()


@pytest.mark.parametrize("family", WITHOUT_ROTATION)
def test_prefixes_are_refused_where_positions_do_not_rotate(family):
    model = built(family)
    with pytest.raises(ValueError, match="rotary positions|no cache that is called"):
        attach(model, PrefixConfig(tokens=2), seed=0)
    assert not layers(model)


def test_the_prefix_of_a_sliding_window_stays_in_sight():
    sizes = {**GROUPED, "layer_types": ["sliding_attention"] * 2, "sliding_window": 3}
    torch.manual_seed(0)
    model = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**sizes)).eval()
    made = attach(model, PrefixConfig(tokens=2, init_std=1.0), seed=0)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        before = model(ids).logits
        for layer in made.values():
            layer.values.mul_(-1.0)
        after = model(ids).logits
    assert (before - after)[:, -1].abs().max() > 1e-3
