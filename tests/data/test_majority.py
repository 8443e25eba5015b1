"""Majority tasks: right labels, both alike often, not to be had from a few words, without leaks between splits."""

import random
import re

import pytest

from mole.data import majority
from mole.data.majority import HEAD, MajorityAConfig

RANGES = {"majority_a": ("w1", "w2"), "majority_b": ("w3", "w4")}
NAMES = sorted(RANGES)


def drawn(name, count, seed=1):
    rng = random.Random(seed)
    return [getattr(majority, name)(rng) for _ in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_right_and_no_text_is_a_draw(name):
    more, less = RANGES[name]
    for text, label in drawn(name, 500):
        words = text.split(" ")
        assert len(words) == 16
        assert all(re.fullmatch(r"w(0[5-9]|[1-5]\d)", word) for word in words)
        lead = sum(word.startswith(more) for word in words) - sum(word.startswith(less) for word in words)
        assert lead
        assert label == ("yes" if lead > 0 else "no")


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_alike_often_and_several_words_decide(name):
    rows = drawn(name, 4000)
    assert abs(sum(label == "yes" for _, label in rows) / 4000 - 0.5) < 0.03
    decisive = [sum(word.startswith(RANGES[name]) for word in text.split()) for text, _ in rows]
    assert sum(count >= 3 for count in decisive) > 0.9 * 4000
    first_seen = [label for text, label in rows if text.split()[0].startswith(RANGES[name][0])]
    assert first_seen.count("yes") < 0.85 * len(first_seen)  # one word tells little


def test_all_words_are_used_and_the_tasks_ask_different_things():
    rows = drawn("majority_a", 500)
    assert {word for text, _ in rows for word in text.split()} == {f"w{number:02}" for number in range(5, 60)}
    b = {"yes" if sum(w[1] == "3" for w in t.split()) > sum(w[1] == "4" for w in t.split()) else "no" for t, _ in rows}
    assert b == {"yes", "no"}


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_of_the_size_asked_for_and_apart(load, name):
    data = load(name=name, examples=300, validation_examples=40, test_examples=50)
    splits = [{sample.prompt for sample in split} for split in (data.train, data.validation, data.test)]
    assert [len(split) for split in (data.train, data.validation, data.test)] == [300, 40, 50]
    assert len(set.union(*splits)) == sum(map(len, splits))
    assert data.head == HEAD == MajorityAConfig().head()
    assert data.metric == "accuracy"
    assert data.validation[2].row == "validation example 3"
    assert {sample.task for sample in data.train} == {name}
    for sample in data.train[:20]:
        assert HEAD.labels[sample.target] == sample.completion


def test_a_seed_gives_the_same_data_and_another_seed_gives_other(load):
    first, again, other = (load(name="majority_a", examples=20, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.test != other.test


def test_no_examples_asked_for_means_no_split(load):
    data = load(name="majority_b", task="mine", examples=3, validation_examples=0, test_examples=0)
    assert data.validation is None
    assert data.test is None
    assert {sample.task for sample in data.train} == {"mine"}
