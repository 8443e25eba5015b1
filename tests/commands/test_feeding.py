"""What training is fed with: the first batch as people read it, and batches of like lengths."""

import json

import pytest
from walk import SMALL, data, mole, train

from mole.cli.main import main
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
    fed = training_data(samples, 0, TrainingConfig(batch_size=2), seed=1)
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
        fed = training_data(samples, 0, TrainingConfig(batch_size=2, group_by_length=group), seed=0)
    order = fed.order(0)
    batches = [[len(samples[i].input_ids) for i in order[s : s + 2]] for s in (0, 2)]
    held = sum(2 * max(batch) for batch in batches)
    assert f"{100 * (held - 24) / held:.1f} %" in caplog.text
    assert not group or held == 24


def test_packed_rows_hold_every_sample_once_and_every_epoch_the_same_rows(caplog):
    samples = [sample(length) for length in (4, 8, 4, 8, 3, 5, 6)]
    with caplog.at_level("INFO"):
        fed = training_data(samples, 0, TrainingConfig(packing=16), seed=3)
    assert sorted(len(s.input_ids) for row in fed.train for s in row) == [3, 4, 4, 5, 6, 8, 8]
    assert all(sum(len(s.input_ids) for s in row) <= 16 for row in fed.train)
    assert sorted(fed.order(0)) == sorted(fed.order(1)) == list(range(len(fed.train)))
    assert f"7 samples in {len(fed.train)} rows of 16 tokens; {100 * (1 - 38 / 48):.1f} %" in caplog.text
    again = training_data(samples, 0, TrainingConfig(packing=16), seed=3)
    assert again.train == fed.train


def test_a_row_is_never_shorter_than_a_sample():
    samples = [sample(length) for length in (4, 8, 4)]
    with pytest.raises(ValueError, match="packing=6, and the longest sample has 8 tokens: set 8 or more"):
        training_data(samples, 0, TrainingConfig(packing=6), seed=0)


def test_rows_that_are_packed_have_nothing_to_group():
    with pytest.raises(ValueError, match="nothing to group"):
        TrainingConfig(packing=64, group_by_length=True)


@pytest.fixture(scope="module")
def packed_and_plain(tmp_path_factory):
    """An epoch of 18 samples, a sample or a row a step."""
    root = tmp_path_factory.mktemp("packing")
    words = ("training.epochs=1", "training.max_steps=null", "training.batch_size=1", "dataset.examples=18")
    train("reverse", root / "library", root / "packed", *words, "training.packing=128")
    train("reverse", root / "library", root / "plain", *words, "name=other")
    return root


def test_a_packed_run_sees_every_token_of_an_epoch_once(packed_and_plain):
    last = {}
    for name in ("packed", "plain"):
        lines = [json.loads(line) for line in (packed_and_plain / name / "metrics.jsonl").read_text().splitlines()]
        last[name] = [line for line in lines if line["phase"] == "train"][-1]
    for fact in ("epoch", "tokens"):
        assert last["packed"][fact] == last["plain"][fact]
    assert last["packed"]["supervised_tokens"] == last["plain"]["supervised_tokens"]
    assert last["packed"]["step"] < 18 / 2
    assert "18 samples in" in (packed_and_plain / "packed" / "log.txt").read_text()
    assert len((packed_and_plain / "packed" / "samples.jsonl").read_text().splitlines()) > 1


def test_a_mixture_trains_on_packed_rows(packed_and_plain):
    run = packed_and_plain / "mixture"
    words = ("training.packing=96", "training.max_steps=2", f"library={packed_and_plain / 'library'}")
    routed = ("router=top_k", f"run.folder={run}")
    mole("build-moe", *SMALL, *data("reverse"), *routed, *words)
    assert "samples in" in (run / "log.txt").read_text()
    assert (run / "mixture").is_dir()


def test_packing_is_refused_where_samples_would_see_each_other(tmp_path, capsys):
    words = ("adapter=prompt", "training.packing=128", f"run.folder={tmp_path / 'run'}", "name=p")
    assert main(["train-expert", *SMALL, *data("reverse"), *words]) == 2
    assert "training.packing" in capsys.readouterr().err
