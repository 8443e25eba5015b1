"""Labels, truncation, and refusal of data with nothing to supervise; against ids written out by hand."""

import copy

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mole.data import IGNORED
from mole.data.encode import encode_pair


def pair(tokenizer, prompt, completion, max_length=None):
    return encode_pair(tokenizer, prompt, completion, task="t", max_length=max_length, where="here:1")


@pytest.fixture(scope="module")
def merging():
    """A tokenizer that joins "a" and "b" into one token."""
    vocabulary = {"<end>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_only_the_completion_and_the_end_token_are_supervised(tokenizer):
    sample = pair(tokenizer, "ab", "cd").sample
    start, a, b, c, d, end = sample.input_ids
    assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode([a, b, c, d]) == "abcd"
    assert sample.labels == (IGNORED, IGNORED, IGNORED, c, d, end)
    assert sample.prompt_ids == (start, a, b)
    assert sample.supervised == 3


def test_a_start_or_end_token_in_the_text_is_not_doubled(tokenizer):
    ids = pair(tokenizer, "<bos>ab", "cd<eos>").sample.input_ids
    assert ids == pair(tokenizer, "ab", "cd").sample.input_ids


def test_an_end_token_that_the_tokenizer_adds_stands_at_the_end_alone(merging):
    adding = copy.deepcopy(merging.backend_tokenizer)
    adding.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    sample = pair(PreTrainedTokenizerFast(tokenizer_object=adding, eos_token="<end>"), "c", "ab").sample
    assert sample.prompt_ids == (3,)
    assert sample.input_ids == (3, 4, 0)


def test_prompt_ids_stay_a_prefix_where_a_token_would_straddle_the_border(merging):
    sample = pair(merging, "ca", "bc").sample
    assert merging("cabc")["input_ids"] == [3, 4, 3]
    assert sample.prompt_ids == (3, 1)
    assert sample.input_ids == (3, 1, 2, 3, 0)
    assert sample.labels == (IGNORED, IGNORED, 2, 3, 0)


def test_prompt_and_completion_are_tokenized_together_where_the_border_holds(merging):
    sample = pair(merging, "c", "ab").sample
    assert sample.input_ids == (3, 4, 0)


def test_truncation_cuts_the_end_and_is_marked(tokenizer):
    whole, cut = pair(tokenizer, "ab", "cdef").sample, pair(tokenizer, "ab", "cdef", max_length=5)
    assert cut.truncated
    assert cut.sample.input_ids == whole.input_ids[:5]
    assert cut.sample.labels == whole.labels[:5]
    assert not pair(tokenizer, "ab", "cdef", max_length=8).truncated


def test_a_prompt_that_fills_the_length_leaves_nothing_to_supervise(tokenizer):
    lost = pair(tokenizer, "abcdef", "gh", max_length=7)
    assert lost.sample is None
    assert "its prompt alone fills max_length=7" in lost.reason


def test_an_empty_completion_leaves_nothing_to_supervise(tokenizer):
    lost = pair(tokenizer, "ab", "")
    assert lost.sample is None
    assert lost.reason == "the completion is empty"


def test_a_sequence_of_one_token_has_nothing_before_it_to_learn_from(merging):
    sample = pair(merging, "", "c").sample
    assert sample.input_ids == (3, 0)
    assert sample.supervised == 1


def test_a_tokenizer_without_end_token_is_refused(merging):
    plain = PreTrainedTokenizerFast(tokenizer_object=merging.backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        pair(plain, "c", "a")


def test_few_examples_without_supervision_are_dropped_and_counted(load, jsonl):
    records = [{"prompt": f"p{i}", "completion": "" if i == 7 else "c"} for i in range(20)]
    data = load(name="jsonl", path=jsonl(records), validation=None, test=None)
    assert len(data.train) == 19
    assert data.dropped == 1


def test_many_examples_without_supervision_are_refused_naming_the_first(load, jsonl):
    records = [{"prompt": f"p{i}", "completion": "" if i in (7, 9) else "c"} for i in range(20)]
    path = jsonl(records)
    with pytest.raises(ValueError, match=r"2 of 20 examples .*max_unsupervised=0.05") as error:
        load(name="jsonl", path=path, validation=None, test=None)
    assert f"the first, {path}:8: the completion is empty: 'p7'" in str(error.value)
    assert load(name="jsonl", path=path, validation=None, test=None, max_unsupervised=0.1).dropped == 2


def test_a_dataset_with_nothing_to_supervise_is_refused_even_when_all_may_be_dropped(load, jsonl):
    path = jsonl([{"prompt": "p", "completion": ""}] * 3)
    with pytest.raises(ValueError, match="no example of the train split has a supervised token: the completion"):
        load(name="jsonl", path=path, validation=None, test=None, max_unsupervised=1.0)


def test_truncated_examples_are_counted(load, jsonl):
    path = jsonl([{"prompt": "p", "completion": "c" * n} for n in (2, 20, 30)])
    data = load(name="jsonl", path=path, validation=None, test=None, max_length=10)
    assert data.truncated == 2
    assert max(len(sample.input_ids) for sample in data.train) == 10


def test_the_backbone_bounds_the_length(load, jsonl):
    path = jsonl([{"prompt": "p", "completion": "c" * 20}])
    data = load(name="jsonl", path=path, validation=None, test=None, max_length=30, context_length=8)
    assert len(data.train[0].input_ids) == 8
