"""Heads for whole texts: pooling equals its formula, padding changes nothing, what cannot act is refused."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers import GPT2ForSequenceClassification as GPT2Classifier

from mole.backbones.heads import (
    LinearHead,
    check_padding,
    class_for,
    head_modules,
    options_for,
    pooled,
    pooler_of,
    seeded,
    with_head,
)
from mole.backbones.tiny_encoder import TinyEncoderConfig, load_tiny_encoder, tokenizer
from mole.head import Head

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
THREE = Head("classification", ("no", "maybe", "yes"))
IDS = torch.arange(1, 15).reshape(2, 7)
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


def inner(kind):
    torch.manual_seed(0)
    made = BertModel(BertConfig(**SMALL)) if kind == "bert" else GPT2Model(GPT2Config(**GPT2))
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@torch.no_grad()
def test_the_linear_head_is_one_map_of_the_pooled_states(kind, pooling):
    model = with_head(inner(kind), "linear", pooling, THREE)
    states = inner(kind)(IDS, attention_mask=MASK)[0]
    want = []
    for row, real in enumerate(MASK.sum(1).tolist()):
        vector = {"cls": states[row, 0], "mean": states[row, :real].mean(0), "last": states[row, real - 1]}[pooling]
        want.append(model.classifier.weight @ vector + model.classifier.bias)
    torch.testing.assert_close(model(IDS, attention_mask=MASK).logits, torch.stack(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@torch.no_grad()
def test_padding_on_the_right_changes_no_logit(pooling):
    model = with_head(inner("bert"), "linear", pooling, THREE)
    alone = model(IDS[1:, :4], attention_mask=MASK[1:, :4]).logits
    torch.testing.assert_close(model(IDS, attention_mask=MASK).logits[1:], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(IDS[1:, :4]).logits, alone, rtol=0, atol=1e-6)


def test_the_last_real_token_is_found_under_padding_on_either_side():
    states = torch.arange(12.0).reshape(2, 6, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    assert pooled(states, mask, "last").flatten().tolist() == [5.0, 8.0]


def test_auto_is_the_first_token_of_an_encoder_and_the_last_of_a_decoder():
    assert with_head(inner("bert"), "linear", "auto", THREE).pooling == "cls"
    assert with_head(inner("gpt2"), "linear", "auto", THREE).pooling == "last"


def test_a_pooling_for_the_native_head_is_refused():
    with pytest.raises(ValueError, match="backbone.pooling=mean acts with backbone.head=linear"):
        with_head(inner("bert"), "native", "mean", THREE)


def test_the_modules_of_a_head_and_its_pooler_are_found():
    bert = BertForSequenceClassification(BertConfig(**SMALL))
    roberta = RobertaForSequenceClassification(RobertaConfig(**SMALL))
    assert (head_modules(bert), pooler_of(bert)) == (("classifier",), "bert.pooler")
    assert (head_modules(roberta), pooler_of(roberta)) == (("classifier",), None)
    linear = with_head(inner("bert"), "linear", "cls", THREE)
    assert (head_modules(linear), pooler_of(linear)) == (("classifier",), None)
    assert isinstance(linear, LinearHead)
    assert list(dict(linear.named_children())) == ["bert", "classifier"]


def test_labels_go_into_the_config_in_their_order():
    assert options_for("native", THREE) == {
        "num_labels": 3,
        "id2label": {0: "no", 1: "maybe", 2: "yes"},
        "label2id": {"no": 0, "maybe": 1, "yes": 2},
        "problem_type": "single_label_classification",
    }
    assert options_for("native", Head("regression"))["num_labels"] == 1
    assert options_for("native", Head("regression"))["problem_type"] == "regression"
    assert options_for("linear", THREE) == {}
    assert class_for("native") is not class_for("linear")


class WithoutPadding:
    pad_token_id = None


def test_a_native_head_of_a_decoder_without_a_padding_token_is_refused_with_the_setting():
    model = GPT2Classifier(GPT2Config(**GPT2))
    with pytest.raises(ValueError, match="no padding token.*set backbone.head=linear"):
        check_padding(WithoutPadding(), model, "native", "gpt2")
    check_padding(WithoutPadding(), with_head(inner("gpt2"), "linear", "auto", THREE), "linear", "gpt2")


def test_the_model_is_told_the_padding_token_of_its_tokenizer():
    model = GPT2Classifier(GPT2Config(**GPT2))
    model.config.pad_token_id = None
    check_padding(tokenizer(), model, "native", "gpt2")
    assert model.config.pad_token_id == 1


def test_new_heads_depend_on_the_seed_alone_and_the_stream_outside_does_not_move():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        first = torch.rand(2)
    assert torch.equal(torch.rand(3), want)
    with seeded(1):
        assert torch.equal(torch.rand(2), first)


def test_the_random_encoder_is_made_of_its_own_seed_and_its_head_of_the_runs():
    two = Head("classification", ("a", "b"))
    one, other = (load_tiny_encoder(TinyEncoderConfig(device="cpu"), head=two, seed=seed).model for seed in (0, 1))
    assert all(
        torch.equal(p, q) for p, q in zip(one.base_model.parameters(), other.base_model.parameters(), strict=True)
    )
    assert not torch.equal(one.classifier.dense.weight, other.classifier.dense.weight)
    assert not any(p.requires_grad for p in one.parameters())
    unlike = load_tiny_encoder(TinyEncoderConfig(device="cpu", weights_seed=1), head=two, seed=0).model
    words, others = (model.get_input_embeddings().weight for model in (one, unlike))
    assert not torch.equal(words, others)


def test_the_random_encoder_without_a_head_is_refused():
    with pytest.raises(ValueError, match="backbone=tiny_encoder writes no text"):
        load_tiny_encoder(TinyEncoderConfig())


def test_texts_of_the_random_encoder_are_words_between_marks():
    assert tokenizer()("w05 w59 zebra")["input_ids"] == [0, 5, 59, 3, 2]
    assert tokenizer()("w05", "w06")["input_ids"] == [0, 5, 2, 2, 6, 2]
