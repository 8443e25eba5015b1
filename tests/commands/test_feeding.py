"""What training is fed with: the first batch as people read it, and batches of like lengths."""

import json
from functools import partial

import pytest
from walk import train

from mole import data
from mole.commands.feeding import parts, show_first_batch, training_data
from mole.config.seeds import seed_for
from mole.data import IGNORED, Sample, by_length, epoch_order
from mole.run_folder import RunFolder
from mole.training import TrainingConfig


def sample(length: int, prompt: int = 2) -> Sample:
    ids = tuple(range(1, length + 1))
    return Sample(ids, (IGNORED,) * prompt + ids[prompt:], "t", "", "", ids[:prompt])


class Spelling:
    """A tokenizer that writes ids as numbers."""

    @staticmethod
    def decode(ids):
        return " ".join(map(str, ids)) + "\x1b "


def test_the_first_batch_is_kept_decoded_and_shown_with_what_is_supervised_marked(tmp_path, capsys):
    samples = [sample(5), sample(4, prompt=1), sample(3)]
    fed = training_data(samples, partial(data.collate, pad_token_id=0), TrainingConfig(batch_size=2), seed=1)
    show_first_batch(fed, TrainingConfig(batch_size=2), Spelling, RunFolder(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    first = [samples[index] for index in epoch_order(3, 0, seed_for("data", 1))[:2]]
    assert [line["tokens"] for line in lines] == [len(one.input_ids) for one in first]
    assert [line["supervised"] for line in lines] == [one.supervised for one in first]
    assert [[part["supervised"] for part in line["parts"]] for line in lines] == [[False, True]] * 2
    shown = capsys.readouterr().out
    assert "⟦" in shown
    assert "\x1b" not in shown


def test_parts_follow_the_labels_and_the_first_token_is_never_supervised():
    one = Sample((7, 8, 9, 10), (7, 8, IGNORED, 10), "t", "", "", ())
    assert parts(one) == [(False, [7]), (True, [8]), (False, [9]), (True, [10])]


def test_batches_by_length_hold_every_sample_once_and_less_padding():
    lengths = [3 + (7 * i) % 40 for i in range(1000)]
    order = epoch_order(1000, 0, seed=5)
    grouped = by_length(order, lengths, 8)
    assert sorted(grouped) == list(range(1000))
    assert grouped == by_length(order, lengths, 8) != by_length(epoch_order(1000, 1, seed=5), lengths, 8)

    def padding(chosen):
        batches = [[lengths[i] for i in chosen[start : start + 8]] for start in range(0, 1000, 8)]
        return sum(len(b) * max(b) - sum(b) for b in batches)

    assert padding(grouped) < 0.2 * padding(order)
    longest = [max(lengths[i] for i in grouped[start : start + 8]) for start in range(0, 400, 8)]
    assert longest != sorted(longest, reverse=True)


def test_a_run_with_batches_by_length_trains_and_tells_its_padding(tmp_path):
    train("reverse", tmp_path / "library", tmp_path / "run", "training.group_by_length=true")
    assert "of what the batches hold is padding" in (tmp_path / "run" / "log.txt").read_text()
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("group", [False, True])
def test_padding_is_what_the_batches_have(caplog, group):
    samples = [sample(length) for length in (4, 8, 4, 8)]
    with caplog.at_level("INFO"):
        fed = training_data(samples, list, TrainingConfig(batch_size=2, group_by_length=group), seed=0)
    order = fed.order(0)
    batches = [[len(samples[i].input_ids) for i in order[s : s + 2]] for s in (0, 2)]
    held = sum(2 * max(batch) for batch in batches)
    assert f"{100 * (held - 24) / held:.1f} %" in caplog.text
    assert not group or held == 24
