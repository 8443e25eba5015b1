"""Texts and pairs: ids as the tokenizer's own call gives them, padded batches of targets, one head for a command."""

import dataclasses
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mole.data import IGNORED, LabelledText, Sample, collate, encode_texts, head_of, metric_of
from mole.data.classification import ClassificationConfig
from mole.data.generated import ReverseConfig
from mole.data.glue import ColaConfig, MnliConfig, RteConfig, Sst2Config, StsbConfig
from mole.data.samples import DataSplits, Split
from mole.head import Head

WORDS = [f"w{number}" for number in range(40)]
BERT = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ["input_ids", "token_type_ids", "attention_mask"])
ROBERTA = ("[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]", ["input_ids", "attention_mask"])


def word_tokenizer(single, pair, inputs):
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_input_names=inputs)


def row(text, second=None, target=1, where="data/dev.tsv:12"):
    return LabelledText(text, second, target, "yes", where)


def samples(tokenizer, rows, max_length=128):
    return [encoded.sample for encoded in encode_texts(tokenizer, rows, task="t", max_length=max_length)]


ROWS = [row("w1 w2"), row("w3", "w4 w5"), row("w1 w2 w3 w4 w5 w6", "w7 w8"), row("w9"), row("w7 w8", "w1 w2 w3 w4 w5")]


@pytest.mark.parametrize("style", [BERT, ROBERTA], ids=["bert", "roberta"])
@pytest.mark.parametrize("max_length", [128, 8, None])
def test_ids_and_types_are_those_of_the_tokenizers_call(style, max_length, monkeypatch):
    monkeypatch.setattr("mole.data.whole_texts.AT_ONCE", 2)
    tokenizer = word_tokenizer(*style)
    cut = {"truncation": "longest_first", "max_length": max_length} if max_length else {}
    for one, given in zip(samples(tokenizer, ROWS, max_length), ROWS, strict=True):
        expected = tokenizer(given.text, given.second, **cut)
        assert list(one.input_ids) == expected["input_ids"]
        types = expected.get("token_type_ids", [])
        assert list(one.token_types) == (types if any(types) else [])


def test_a_single_text_has_one_end_and_a_pair_the_tokenizers():
    single, pair, *_ = samples(word_tokenizer(*ROBERTA), ROWS)
    assert single.input_ids == (1, 5, 6, 2)
    assert pair.input_ids == (1, 7, 2, 2, 8, 9, 2)


def test_the_longer_text_is_cut_and_counted():
    found = list(encode_texts(word_tokenizer(*BERT), ROWS, task="t", max_length=8))
    assert [encoded.truncated for encoded in found] == [False, False, True, False, True]
    assert found[2].sample.input_ids == (1, 5, 6, 7, 2, 11, 12, 2)
    whole = list(encode_texts(word_tokenizer(*BERT), ROWS[2:3], task="t", max_length=11))
    assert not whole[0].truncated  # as long as may be


def test_a_sample_says_where_it_stood_and_supervises_no_token():
    sample = samples(word_tokenizer(*BERT), ROWS)[1]
    assert (sample.row, sample.task, sample.target, sample.completion) == ("dev.tsv:12", "t", 1, "yes")
    assert set(sample.labels) == {IGNORED}
    assert sample.supervised == 1
    assert sample.prompt == "w3\nw4 w5"


def test_a_batch_has_targets_types_and_padding():
    batch = collate(samples(word_tokenizer(*BERT), [row("w1"), row("w3", "w4 w5", 0)]), pad_token_id=0)
    assert batch["input_ids"].tolist() == [[1, 5, 2, 0, 0, 0], [1, 7, 2, 8, 9, 2]]
    assert batch["token_type_ids"].tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert torch.equal(batch["prompt_mask"], batch["attention_mask"].bool())
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == batch["token_type_ids"].dtype == torch.int64


def test_types_stand_where_the_tokens_do_with_padding_on_the_left():
    rows = [row("w1", "w2"), row("w3", "w4 w5")]
    batch = collate(samples(word_tokenizer(*BERT), rows), pad_token_id=0, padding_side="left")
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_numbers_are_float_labels_and_no_types_are_no_key():
    batch = collate(samples(word_tokenizer(*ROBERTA), [row("w1", target=2.5), row("w2", target=0.0)]), pad_token_id=0)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [2.5, 0.0]
    assert "token_type_ids" not in batch


def test_samples_of_two_kinds_make_no_batch():
    texts = samples(word_tokenizer(*BERT), [row("w1"), row("w2", target=0.5)])
    tokens = Sample((1, 5), (IGNORED, 5), "reverse", "", "", (1,))
    with pytest.raises(ValueError, match=r"a label \(task t\).*tokens to predict \(task reverse\)"):
        collate([texts[0], tokens], pad_token_id=0)
    with pytest.raises(ValueError, match=r"a label.*a number"):
        collate(texts, pad_token_id=0)


glue = partial(dict, path="nowhere")


def test_the_head_is_known_from_the_configs_alone():
    assert head_of({}) is None
    assert head_of({"reverse": ReverseConfig()}) is None
    assert head_of({"rte": RteConfig(**glue())}) == Head("classification", ("entailment", "not_entailment"))
    assert head_of({"stsb": StsbConfig(**glue())}) == Head("regression")
    assert head_of({"a": ColaConfig(**glue()), "b": Sst2Config(**glue())}) == Head("classification", ("0", "1"))


def test_datasets_that_want_different_heads_are_refused_by_name():
    with pytest.raises(ValueError, match="dataset one is .*entailment, not_entailment.* dataset two is .*neutral"):
        head_of({"one": RteConfig(**glue()), "two": MnliConfig(**glue())})
    with pytest.raises(ValueError, match="dataset rte is classification.*dataset words is text to be continued"):
        head_of({"rte": RteConfig(**glue()), "words": ReverseConfig()})
    with pytest.raises(ValueError, match="dataset words is text.*dataset stsb is regression"):
        head_of({"words": ReverseConfig(), "stsb": StsbConfig(**glue())})


def test_the_order_of_labels_is_part_of_the_head():
    ways = [ClassificationConfig(path="x", labels=labels) for labels in (("a", "b"), ("b", "a"))]
    with pytest.raises(ValueError, match="same labels in the same order"):
        head_of({"one": ways[0], "two": ways[1]})


def test_the_main_metric_is_the_datasets_own_where_they_agree():
    plain = DataSplits(Split(()), None, None, "x", "")
    cola = dataclasses.replace(plain, head=Head("classification", ("0", "1")), metric="mcc")
    assert metric_of([]) is None
    assert metric_of([plain]) is None
    assert metric_of([cola, cola]) == "mcc"
    assert metric_of([cola, dataclasses.replace(cola, metric="accuracy_f1")]) == "accuracy"


def test_the_fingerprint_covers_targets(load, jsonl):
    def fingerprint(label):
        rows = [{"text": "a", "label": 0}, {"text": "b", "label": label}]
        return load(name="classification", path=jsonl(rows), labels=[0, 1], validation=None, test=None).fingerprint

    assert fingerprint(1) != fingerprint(0)
