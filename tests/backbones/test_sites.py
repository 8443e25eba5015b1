"""Where sub-layers end, over the table of families: order, parts, norms, overrides, refusals."""

import pytest
import torch
import transformers as t
from torch import nn

from mole.backbones.sites import FAMILIES, is_norm, norms_of, sites_of

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 12}
TEXT = {**SMALL, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
MARKS = {"cls_token_id": 1, "sep_token_id": 2}
BUILD = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT)),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT)),
    "xlm-roberta": lambda: t.XLMRobertaForMaskedLM(t.XLMRobertaConfig(**TEXT)),
    "camembert": lambda: t.CamembertForMaskedLM(t.CamembertConfig(**TEXT)),
    "electra": lambda: t.ElectraForSequenceClassification(t.ElectraConfig(**TEXT, embedding_size=16)),
    "deberta-v2": lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**TEXT)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(dim=16, hidden_dim=24, n_heads=2, n_layers=12, vocab_size=32)
    ),
    "mpnet": lambda: t.MPNetForSequenceClassification(t.MPNetConfig(**TEXT)),
    "modernbert": lambda: t.ModernBertForSequenceClassification(t.ModernBertConfig(**TEXT, **MARKS)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT, num_key_value_heads=1)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**GROUPED)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED)),
    "gemma3_text": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**TEXT, num_key_value_heads=1)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=16, n_layer=12, n_head=2, vocab_size=32, bos_token_id=1, eos_token_id=2)
    ),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT)),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**TEXT)),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SMALL, image_size=8, patch_size=4)),
}


def built(family):
    with torch.device("meta"):
        return BUILD[family]()


def test_every_family_of_the_table_is_tried_here():
    assert set(BUILD) == set(FAMILIES)


@pytest.mark.parametrize("family", BUILD)
def test_the_table_finds_two_sites_a_block_attention_first_blocks_in_the_order_of_numbers(family):
    model = built(family)
    sites, modules = sites_of(model), dict(model.named_modules())
    assert [(site.layer, site.part) for site in sites] == [
        (n, part) for n in range(12) for part in ("attention", "ffn")
    ]
    for site in sites:
        if site.kind == "output":
            assert site.norm == f"{site.path}.LayerNorm"
            assert is_norm(modules[site.norm])
        elif site.kind == "split":
            assert is_norm(modules[site.norm])
            assert modules[site.path].weight.shape[0] == 16
            assert {site.reads, site.gives} <= set(modules)
        else:
            assert modules[site.path].weight.dim() == 2
            assert site.path.startswith(f"{site.whole}.")


@pytest.mark.parametrize("family", BUILD)
def test_the_norms_are_those_of_the_backbone_without_its_head(family):
    model = built(family)
    norms = norms_of(model)
    assert all(path.startswith(f"{model.base_model_prefix}.") for path in norms)
    inner = {f"{model.base_model_prefix}.{path}" for path in norms_of(model.base_model)}
    assert set(norms) == inner
    closing = {site.norm for site in sites_of(model) if site.norm}
    assert closing <= set(norms)
    assert len(norms) >= 13


def test_norms_of_a_head_are_left_out():
    model = built("modernbert")
    assert is_norm(model.head.norm)
    assert "head.norm" not in norms_of(model)
    assert len(norms_of(built("roberta"))) == 25


def test_what_is_no_norm_of_features_is_none():
    assert is_norm(nn.LayerNorm(4))
    assert is_norm(nn.RMSNorm(4))
    assert not is_norm(nn.LayerNorm(4, elementwise_affine=False))
    assert not is_norm(nn.LayerNorm((4, 4)))
    assert not is_norm(nn.BatchNorm1d(4))


def small_t5():
    return t.T5ForConditionalGeneration(t.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))


def test_an_override_finds_sites_in_a_family_that_the_table_lacks():
    words = {"attention": r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.o"}
    words["ffn"] = r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wo"
    sites = sites_of(small_t5(), words)
    assert [(site.layer, site.part, site.kind) for site in sites] == [
        (0, "attention", "linear"),
        (0, "ffn", "linear"),
        (1, "attention", "linear"),
        (1, "ffn", "linear"),
    ]
    assert sites[1].whole == "encoder.block.0.layer.1.DenseReluDense"


def test_an_override_comes_before_the_table():
    words = {"ffn": r"bert\.encoder\.layer\.\d+\.output", "kind": "output"}
    sites = sites_of(built("bert"), words)
    assert [site.path for site in sites] == [f"bert.encoder.layer.{n}.output" for n in range(12)]
    assert all(site.kind == "output" and site.part == "ffn" for site in sites)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"attention": r"encoder\.layr\.\d+\.attention\.output"},
            "attention: .* no module .nearest: .*encoder",
        ),
        ({"kind": "output"}, "names neither attention nor ffn"),
        ({"attn": ".*"}, "adapter.sites: unknown key 'attn'"),
        ({"ffn": ".*dense", "kind": "post"}, "adapter.sites: unknown kind 'post'"),
        ({"ffn": r".*\.intermediate", "kind": "output"}, "has no dropout, LayerNorm: it is no output module"),
    ],
)
def test_a_wrong_override_is_refused_with_the_field(words, message):
    with pytest.raises(ValueError, match=message):
        sites_of(built("bert"), words)


def test_an_unknown_family_is_refused_with_the_known_ones_and_the_field_to_set():
    with pytest.raises(ValueError, match=r"model_type 't5'.*known: .*llama.*adapter.sites="):
        sites_of(small_t5())
