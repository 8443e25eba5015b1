"""Windows of plain text: exact counts, no token lost or repeated, no leak into held-out parts."""

import pytest

LINES = "".join(f"line {i:04d}\n" for i in range(400))  # 4,000 characters, ten of them a line


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(LINES)
    return str(file)


def joined(split):
    return "".join(sample.completion for sample in split)


def test_every_token_is_in_exactly_one_window(load, tokenizer, path):
    data = load(name="text", path=path, window=64, validation=None)
    assert [len(sample.input_ids) for sample in data.train] == [64] * 62 + [32]
    ids = [token for sample in data.train for token in sample.input_ids]
    assert ids == tokenizer(LINES, add_special_tokens=False)["input_ids"]
    assert all(sample.labels == sample.input_ids for sample in data.train)
    assert all(sample.prompt_ids == () for sample in data.train)
    assert (data.dropped, data.truncated, data.name) == (0, 0, "book")


def test_held_out_parts_are_contiguous_from_the_end_and_share_no_character(load, path):
    data = load(name="text", path=path, window=50, validation=0.1, test=0.2)
    assert joined(data.train) + joined(data.validation) + joined(data.test) == LINES
    assert (len(joined(data.train)), len(joined(data.validation)), len(joined(data.test))) == (2800, 400, 800)
    assert [len(data.train), len(data.validation), len(data.test)] == [56, 8, 16]


def test_a_cut_tears_no_line_apart(load, path):
    data = load(name="text", path=path, window=50, validation=0.1013)
    assert joined(data.validation).startswith("line ")
    assert joined(data.train).endswith("\n")
    assert joined(data.train) + joined(data.validation) == LINES


def test_a_number_holds_out_that_many_windows(load, path):
    data = load(name="text", path=path, window=40, validation=5)
    assert len(data.validation) == 5
    assert joined(data.validation) == LINES[-200:]


def test_a_held_out_part_may_be_a_file_of_its_own(load, path, tmp_path):
    (tmp_path / "other.txt").write_text("other words")
    data = load(name="text", path=path, window=40, validation=str(tmp_path / "other.txt"))
    assert joined(data.train) == LINES
    assert joined(data.validation) == "other words"


def test_a_single_token_left_over_is_dropped_and_counted(load, tmp_path):
    (tmp_path / "short.txt").write_text("abcdefghi")
    data = load(name="text", path=str(tmp_path / "short.txt"), window=4, validation=None)
    assert [len(sample.input_ids) for sample in data.train] == [4, 4]
    assert data.dropped == 1


def test_limits_take_windows_at_equal_distances_of_each_part(load, path):
    every = load(name="text", path=path, window=50, validation=0.1, test=0.1)
    few = load(name="text", path=path, window=50, validation=0.1, test=0.1, limit=3, held_out_limit=2)
    third, half = len(every.train) / 3, len(every.test) / 2
    assert list(few.train) == [every.train[int(third * n)] for n in range(3)]
    assert list(few.test) == [every.test[int(half * n)] for n in range(2)]
    assert len(few.validation) == 2


def test_a_limit_above_what_there_is_takes_all(load, path):
    every = load(name="text", path=path, window=50, validation=0.1)
    assert load(name="text", path=path, window=50, validation=0.1, limit=10_000, held_out_limit=10_000) == every


def test_a_window_longer_than_the_backbone_takes_is_refused(load, path):
    with pytest.raises(ValueError, match="window=256: the backbone takes 128 tokens"):
        load(name="text", path=path, context_length=128)


def test_held_out_parts_that_leave_nothing_to_train_on_are_refused(load, path):
    with pytest.raises(ValueError, match="nothing is left to train on with validation=90, test=20"):
        load(name="text", path=path, window=40, validation=90, test=20)


def test_text_of_one_token_is_refused(load, tmp_path):
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(ValueError, match="no example of the train split has a supervised token"):
        load(name="text", path=str(tmp_path / "short.txt"), validation=None)
