"""Formats of records, and how they are split."""

import pytest
from pydantic import ValidationError

ALL = {"validation": None, "test": None}


def only(load, jsonl, record, **options):
    """The one sample that comes of one record."""
    return load(name="jsonl", path=jsonl([record]), **{**ALL, **options}).train[0]


def test_prompt_and_completion_are_joined_as_they_are(load, jsonl):
    sample = only(load, jsonl, {"prompt": "Say ", "completion": " hi"})
    assert (sample.prompt, sample.completion, sample.task) == ("Say ", " hi", "facts")


def test_a_source_is_parted_from_its_target_by_a_line_break_unless_it_ends_in_white_space(load, jsonl):
    assert only(load, jsonl, {"source": "Q?", "target": "A"}).prompt == "Q?\n"
    assert only(load, jsonl, {"source": "Q: ", "target": "A"}).prompt == "Q: "
    assert only(load, jsonl, {"source": "Q?", "target": "A"}, separator=" -> ").prompt == "Q? -> "


def test_the_record_s_task_name_is_the_sample_s_task_unless_the_config_names_one(load, jsonl):
    record = {"source": "s", "target": "t", "task_name": "rte"}
    assert only(load, jsonl, record).task == "rte"
    assert only(load, jsonl, record, task="mine").task == "mine"


def test_alpaca_shows_the_input_where_there_is_one(load, jsonl):
    plain = only(load, jsonl, {"instruction": "Add.", "input": "", "output": "3"})
    assert plain.prompt == "### Instruction:\nAdd.\n\n### Response:\n"
    given = only(load, jsonl, {"instruction": "Add.", "input": "1 2", "output": "3"})
    assert given.prompt == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert given.completion == "3"


def test_columns_name_the_fields_of_a_format_anew(load, jsonl):
    record = {"question": "1+1?", "answer": 2}
    sample = only(load, jsonl, record, columns={"prompt": "question", "completion": "answer"})
    assert (sample.prompt, sample.completion) == ("1+1?", "2")
    with pytest.raises(ValueError, match=r"facts\.jsonl:1: columns: unknown column 'anser'; did you mean answer"):
        only(load, jsonl, record, columns={"prompt": "question", "completion": "anser"})


def test_a_format_that_is_named_must_have_its_keys(load, jsonl):
    with pytest.raises(
        ValueError, match=r"facts\.jsonl:1: format alpaca needs instruction, output; the record has prom"
    ):
        only(load, jsonl, {"prompt": "p", "completion": "c"}, format="alpaca")


RECORDS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(40)]


def prompts(split):
    return [sample.prompt for sample in split]


def test_shares_and_numbers_are_held_out_at_random_without_overlap(load, jsonl):
    data = load(name="jsonl", path=jsonl(RECORDS), validation=0.25, test=7)
    assert (len(data.train), len(data.validation), len(data.test)) == (23, 10, 7)
    everything = prompts(data.train) + prompts(data.validation) + prompts(data.test)
    assert sorted(everything) == sorted(record["prompt"] for record in RECORDS)
    assert prompts(data.test) != [f"p{i}" for i in range(7)]
    number = [int(prompt[1:]) for prompt in prompts(data.train)]
    assert number == sorted(number)


def test_splits_follow_the_seed(load, jsonl):
    path = jsonl(RECORDS)
    one, same, other = (load(name="jsonl", path=path, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert prompts(one.test) != prompts(other.test)


def test_a_held_out_split_may_be_a_file_of_its_own(load, jsonl):
    held_out = jsonl([{"prompt": "x", "completion": "y"}], name="held-out.jsonl")
    data = load(name="jsonl", path=jsonl(RECORDS), validation=held_out, test=None)
    assert (len(data.train), prompts(data.validation), data.test) == (40, ["x"], None)


def test_a_limit_takes_the_first_records(load, jsonl):
    data = load(name="jsonl", path=jsonl(RECORDS), limit=5, **ALL)
    assert prompts(data.train) == [f"p{i}" for i in range(5)]


def test_held_out_splits_that_leave_nothing_to_train_on_are_refused(load, jsonl):
    with pytest.raises(ValueError, match=r"nothing is left to train on: 40 records, validation=30, test=10"):
        load(name="jsonl", path=jsonl(RECORDS), validation=30, test=10)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, 0.0])
def test_a_held_out_part_is_a_share_a_number_or_a_name(load, jsonl, wrong):
    with pytest.raises(ValidationError):
        load(name="jsonl", path=jsonl(RECORDS), validation=wrong)


def test_the_fingerprint_covers_every_split(load, jsonl):
    first = load(name="jsonl", path=jsonl(RECORDS), validation=5, test=5)
    again = load(name="jsonl", path=jsonl(RECORDS, name="copy.jsonl"), validation=5, test=5, task="facts")
    changed = load(
        name="jsonl", path=jsonl([*RECORDS[:-1], {"prompt": "p39", "completion": "other"}]), validation=5, test=5
    )
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != changed.fingerprint


def test_what_is_cut_or_left_out_is_told_in_one_line(load, jsonl, caplog):
    records = [{"prompt": "p", "completion": "c" * length} for length in (1, 1, 30)] + [
        {"prompt": "p" * 30, "completion": "c"}
    ]
    path = jsonl(records)
    splits = load(name="jsonl", path=path, max_length=8, max_unsupervised=0.5, **ALL)
    assert (splits.truncated, splits.dropped) == (2, 1)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "2 of 4 examples (50.0%) were cut" in line
    assert "1 of 4 were left out" in line
    caplog.clear()
    load(name="jsonl", path=path, **ALL)
    assert not caplog.records
