"""Packed rows as data: which samples share a row, and the tensors of a batch of them."""

import random

import pytest

from mole.data import IGNORED, Sample, collate, collate_packed, first_fit


def naive_first_fit(lengths, capacity):
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row in rows:
            if sum(lengths[i] for i in row) + lengths[index] <= capacity:
                row.append(index)
                break
        else:
            rows.append([index])
    return rows


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17, 200])
@pytest.mark.parametrize("capacity", [32, 100])
def test_rows_are_those_of_the_plain_search(count, capacity):
    draw = random.Random(count)
    lengths = [draw.randint(1, 32) for _ in range(count)]
    rows = first_fit(lengths, capacity)
    assert rows == naive_first_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(count))


def test_rows_are_nearly_full():
    lengths = [1 + (7 * i) % 90 for i in range(5000)]
    rows = first_fit(lengths, 256)
    assert sum(lengths) > 0.99 * 256 * (len(rows) - 1)


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="12 tokens does not fit into rows of 10"):
        first_fit([3, 12], 10)


def text(ids, prompt=1, task="t") -> Sample:
    return Sample(ids, (IGNORED,) * prompt + ids[prompt:], task, f"p{ids[0]}", "", ids[:prompt])


def test_a_batch_of_rows():
    window = Sample((7, 8), (7, 8), "w", "", "", ())
    batch = collate_packed([[text((3, 4, 5)), window], [text((6, 9), task="u")]], pad_token_id=1)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 7, 8], [6, 9, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 4, 5, -100, 8], [-100, 9, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1], [2, 2, -1, -1, -1]]
    assert batch["prompt_mask"].int().tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert batch["task_names"] == ["t", "w", "u"]
    assert batch["texts"] == ["p3", "", "p6"]
    assert "attention_mask" not in batch


def test_what_is_a_prompt_is_as_in_a_batch_of_samples():
    samples = [text((3, 4, 5), prompt=2), Sample((7, 8), (7, 8), "w", "", "", ()), text((5, 6))]
    packed, alone = collate_packed([samples], 0), collate(samples, 0)
    assert packed["prompt_mask"][0].tolist() == alone["prompt_mask"][alone["attention_mask"].bool()].tolist()


def test_whole_texts_and_empty_rows_are_refused():
    labelled = Sample((3, 4), (IGNORED, IGNORED), "t", "", "yes", (3, 4), target=1)
    with pytest.raises(ValueError, match="training.packing=null"):
        collate_packed([[labelled]], 0)
    for rows in ([], [[]]):
        with pytest.raises(ValueError, match="at least one"):
            collate_packed(rows, 0)
