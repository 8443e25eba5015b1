"""Conversations in the tokenizer's own chat template: which tokens are supervised."""

import copy

import pytest

from mole.data import IGNORED
from mole.data.messages import encode_messages

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]
PLAIN_TURNS = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}…{% endif %}\n{% endfor %}"
)


def encode(tokenizer, messages=TALK, max_length=None):
    return encode_messages(tokenizer, messages, task="talk", max_length=max_length, where="talk.jsonl:1")


def with_template(tokenizer, template):
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def supervised(tokenizer, sample):
    return tokenizer.decode([label for label in sample.labels if label != IGNORED])


def test_assistant_turns_and_their_end_tokens_alone_are_supervised(tokenizer):
    sample = encode(tokenizer).sample
    assert tokenizer.decode(sample.input_ids) == "<bos>hi\nyes<eos>so\nno<eos>"
    assert supervised(tokenizer, sample) == "yes<eos>no<eos>"
    assert all(label in (IGNORED, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))


def test_the_prompt_is_all_before_the_last_assistant_turn(tokenizer):
    sample = encode(tokenizer).sample
    assert tokenizer.decode(sample.prompt_ids) == sample.prompt == "<bos>hi\nyes<eos>so\n"
    assert sample.input_ids[: len(sample.prompt_ids)] == sample.prompt_ids
    assert sample.completion == "no"


def test_the_start_token_is_not_doubled(tokenizer):
    ids = encode(tokenizer).sample.input_ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_what_asks_the_assistant_to_speak_is_prompt(tokenizer):
    sample = encode(with_template(tokenizer, PLAIN_TURNS), TALK[:2]).sample
    assert tokenizer.decode(sample.input_ids) == "[u]hi\n[a]yes\n<eos>"
    assert sample.prompt == "[u]hi\n[a]"


def test_a_template_that_ends_turns_without_a_special_token_gets_the_end_token_supervised(tokenizer):
    sample = encode(with_template(tokenizer, PLAIN_TURNS)).sample
    assert supervised(tokenizer, sample) == "yes\nno\n<eos>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"talk\.jsonl:1: the chat template writes .* turn 2 differently"):
        encode(with_template(tokenizer, FORGETFUL))


def test_a_tokenizer_without_template_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        encode(with_template(tokenizer, None))


def test_a_conversation_without_assistant_has_nothing_to_supervise(tokenizer):
    lost = encode(tokenizer, TALK[:1])
    assert lost.sample is None
    assert lost.reason == "it has no assistant message with a content"


def test_truncation_may_leave_nothing_to_supervise(tokenizer):
    assert encode(tokenizer, max_length=4).sample is None
    assert supervised(tokenizer, encode(tokenizer, max_length=6).sample) == "ye"


@pytest.mark.parametrize("wrong", ["text", [], [{"role": "user"}], [{"role": "user", "content": 3}], ["hi"]])
def test_malformed_messages_are_refused_with_file_and_line(load, jsonl, wrong):
    path = jsonl([{"messages": wrong}])
    with pytest.raises(ValueError, match=r"facts\.jsonl:1: (messages must be|message 1 must have)"):
        load(name="jsonl", path=path, validation=None, test=None)


def test_conversations_are_read_from_json_lines(load, jsonl, tokenizer):
    data = load(name="jsonl", path=jsonl([{"messages": TALK}]), validation=None, test=None)
    assert supervised(tokenizer, data.train[0]) == "yes<eos>no<eos>"
