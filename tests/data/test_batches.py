"""Padding and order, against a naive loop."""

import pytest
import torch

from mole.data import IGNORED, Sample, collate, epoch_order

SAMPLES = [
    Sample((1, 5, 6, 2), (IGNORED, IGNORED, 6, 2), "a", "", "", (1, 5)),
    Sample((1, 7), (IGNORED, 7), "b", "", "", (1,)),
]


def test_right_padding_keeps_tokens_left_and_supervises_no_padding():
    batch = collate(SAMPLES, pad_token_id=2)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2], [1, 7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 2], [-100, 7, -100, -100]]
    assert batch["prompt_mask"].tolist() == [[True, True, False, False], [True, False, False, False]]
    assert batch["task_names"] == ["a", "b"]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["prompt_mask"].dtype is torch.bool


def test_left_padding_is_the_same_shifted():
    batch = collate(SAMPLES, pad_token_id=0, padding_side="left")
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2], [0, 0, 1, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 2], [-100, -100, -100, 7]]
    assert batch["prompt_mask"].tolist() == [[True, True, False, False], [False, False, True, False]]


def test_an_empty_batch_and_an_unknown_side_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], 0)
    with pytest.raises(ValueError, match="'left' or 'right'"):
        collate(SAMPLES, 0, padding_side="middle")


def test_an_epoch_visits_every_sample_once_and_each_epoch_in_its_own_order():
    first, second = epoch_order(50, 0, seed=1), epoch_order(50, 1, seed=1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first == epoch_order(50, 0, seed=1)
    assert first != epoch_order(50, 0, seed=2)


def test_a_split_is_a_sequence_of_its_samples(load):
    train = load(name="reverse", examples=6).train
    assert len(train) == 6
    assert list(train)[2] is train[2] is train[1:4][1]
    assert len(train[1:4]) == 3
