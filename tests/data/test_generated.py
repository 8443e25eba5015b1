"""Generated tasks: right answers, seeded, without leaks between splits."""

import random

import pytest

from mole.data import generated
from mole.data.generated import GeneratedConfig
from mole.registry import DATASETS

NAMES = sorted(variant.name for variant in DATASETS if issubclass(variant.config, GeneratedConfig))


def quoted(prompt):
    return prompt.split('"')[1]


ANSWERS = {
    "arithmetic": lambda given: str(sum(int(number) for number in given.split(", "))),
    "reverse": lambda given: "".join(reversed(given)),
    "sorting": lambda given: "".join(sorted(given)),
    "shouting": lambda given: given.upper(),
    "consonants": lambda given: given.translate(str.maketrans("", "", "aeiou")),
    "initials": lambda given: "".join(word[0] for word in given.split("-")),
    "cipher": lambda given: given.translate(str.maketrans("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza")),
}


def test_there_are_at_least_five_kinds_of_task():
    assert set(NAMES) == set(ANSWERS)
    assert len(NAMES) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_right(name):
    rng = random.Random(1)
    for prompt, completion in (getattr(generated, name)(rng) for _ in range(200)):
        assert completion == ANSWERS[name](quoted(prompt))
        assert completion


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_short_and_end_in_a_supervised_end_token(load, tokenizer, name):
    data = load(name=name, examples=50, validation_examples=5, test_examples=5)
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 5, 5)
    for sample in data.train:
        assert len(sample.input_ids) <= 48
        assert sample.task == name
        assert sample.labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(sample.prompt_ids, skip_special_tokens=True) == sample.prompt


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_of_one_split_is_in_another(load, name):
    data = load(name=name, examples=300, validation_examples=40, test_examples=40)
    train, validation, test = (
        {sample.prompt for sample in split} for split in (data.train, data.validation, data.test)
    )
    assert len(validation) == len(test) == 40
    assert train.isdisjoint(validation)
    assert train.isdisjoint(test)
    assert validation.isdisjoint(test)


def test_a_seed_gives_the_same_data_and_another_seed_gives_other(load):
    first, again, other = (load(name="reverse", examples=20, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_the_test_split_does_not_depend_on_how_much_is_trained_on(load):
    few, many = (load(name="reverse", examples=n) for n in (5, 50))
    assert few.test == many.test
    assert few.fingerprint != many.fingerprint


def test_training_examples_are_unlimited_and_held_out_ones_refused_when_too_many(load):
    assert len(load(name="arithmetic", examples=5000, validation_examples=0, test_examples=0).train) == 5000
    with pytest.raises(ValueError, match=r"arithmetic: found only \d+ different examples, not 3000"):
        load(name="arithmetic", examples=1, test_examples=3000)


def test_no_examples_asked_for_means_no_split(load):
    data = load(name="shouting", examples=3, validation_examples=0, test_examples=0)
    assert data.validation is None
    assert data.test is None


def test_every_task_begins_with_its_own_word():
    first = {name: getattr(generated, name)(random.Random(0))[0].split()[0] for name in NAMES}
    assert len(set(first.values())) == len(NAMES)


def test_the_task_name_can_be_chosen(load):
    assert {sample.task for sample in load(name="reverse", task="mirror", examples=3).train} == {"mirror"}
