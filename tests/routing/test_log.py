"""The scalings log: what is kept, what is written, what is read back."""

import copy
import gc
import json
import logging
import os
import pickle

import numpy as np
import pytest
import torch

from mole.routing.log import RoutingLog, load_routing_log, load_scalings_log

LAYERS = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.2.q_proj")
EXPERTS = ("sums", "words")


def scalings(batch=2, length=3, layers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, length, layers, len(EXPERTS), generator=generator).softmax(-1)


def new_log(**limits):
    return RoutingLog(LAYERS, EXPERTS, **limits)


def filled(*shapes, **limits):
    log = new_log(**limits)
    given = [scalings(batch, length, seed=i) for i, (batch, length) in enumerate(shapes)]
    for one in given:
        log.record(one)
    return log, given


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_equal_lists(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# ---- recording
def test_an_entry_is_a_detached_float32_copy():
    log, weights = new_log(), scalings().requires_grad_()
    log.record(weights)
    with torch.no_grad():
        weights.zero_()
    (entry,) = log.entries()
    assert not entry.requires_grad
    torch.testing.assert_close(entry, scalings(), rtol=0, atol=0)


def test_bfloat16_scalings_are_logged_as_float32(tmp_path):
    log, weights = new_log(), scalings().bfloat16()
    log.record(weights)
    log.flush(tmp_path / "log")
    assert_equal_lists(load_scalings_log(tmp_path / "log"), [weights.float()[None]])


def test_shared_scalings_take_the_memory_of_one_layer_and_read_as_all():
    log, shared = new_log(max_bytes=2 * 3 * 2 * 4), scalings(layers=1)
    log.record(shared)
    assert log.log_dropped == 0
    assert_equal_lists(log.entries(), [shared.expand(2, 3, 3, 2)])
    log = new_log(max_bytes=2 * 3 * 2 * 4)
    log.record(shared.expand(2, 3, 3, 2))
    assert log.log_dropped == 0
    assert_equal_lists(log.entries(), [shared.expand(2, 3, 3, 2)])


def test_a_static_routing_takes_the_memory_of_one_token(tmp_path):
    log, one = new_log(max_bytes=8), scalings(1, 1, 1)
    log.record(one.expand(4, 5, 3, 2))
    assert (len(log), log.log_dropped) == (1, 0)
    log.flush(tmp_path / "log")
    assert np.load(tmp_path / "log.npy").shape == (1, 4, 5, 3, 2)


def test_every_second_forward_is_kept():
    log, given = filled(*[(1, 2)] * 5, every=2)
    assert_equal_lists(log.entries(), given[::2])


def test_a_stopped_log_records_nothing_and_refuses_to_flush(tmp_path):
    log, given = filled((1, 2))
    log.enabled = False
    log.record(scalings())
    assert_equal_lists(log.entries(), given)
    with pytest.raises(RuntimeError, match="^Scalings logging is disabled!$"):
        log.flush(tmp_path / "log")
    assert names(tmp_path) == []
    log.flush(tmp_path / "log", allow_disabled=True)
    assert "log.npy" in names(tmp_path)


def test_an_empty_log_refuses_to_flush(tmp_path):
    with pytest.raises(ValueError, match=r"^No log scalings to flush\.$"):
        new_log().flush(tmp_path / "log")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scalings": torch.ones(1, 2, 2, 2)}, "1 or 3"),
        ({"scalings": torch.ones(1, 2, 3, 3)}, "2 experts"),
        ({"scalings": torch.ones(1, 2, 3, 2), "token_ids": torch.ones(1, 3)}, "token_ids"),
        ({"scalings": torch.ones(1, 2, 3, 2), "mask": torch.ones(2, 2)}, "mask"),
        ({"scalings": torch.ones(2, 2, 3, 2), "task_names": ["a"]}, "2 rows"),
        ({"scalings": torch.ones(1, 2, 3, 2), "phase": "evaluation"}, "phase"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    log = new_log()
    with pytest.raises(ValueError, match=message):
        log.record(given.pop("scalings"), **given)
    assert len(log) == 0


@pytest.mark.parametrize("limits", [{"max_entries": 0}, {"every": 0}, {"max_bytes": -1}, {"dtype": "int8"}])
def test_limits_that_cannot_be_are_refused(limits):
    with pytest.raises(ValueError, match="routing log"):
        new_log(**limits)


# ---- limits
def test_over_the_limit_the_oldest_are_dropped_counted_and_reported_once(caplog):
    with caplog.at_level(logging.WARNING):
        log, given = filled(*[(1, 2)] * 6, max_entries=2)
    assert_equal_lists(log.entries(), given[4:])
    assert log.log_dropped == 4
    assert len(caplog.records) == 1


def test_ten_thousand_forwards_stay_within_the_bytes_allowed(tmp_path):
    log, limit = new_log(max_bytes=50_000), 50_000
    peak = 0
    for step in range(10_000):
        log.record(torch.full((1, 2, 1, 2), float(step)), token_ids=torch.full((1, 2), step))
        if step % 500 == 0:
            held = [t for entry in log._entries for t in (entry.weights, entry.tokens)]
            peak = max(peak, sum(t.numel() * t.element_size() for t in held))
    assert 0 < peak <= limit
    assert log.log_dropped == 10_000 - len(log)
    assert log.entries()[-1][0, 0, 0, 0] == 9999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_over_the_limit_entries_spill_to_disk_and_nothing_is_lost(tmp_path, dtype):
    log = new_log(max_entries=3, spill_dir=tmp_path / "spill", dtype=dtype)
    given = [scalings(1, 2 + i % 2, layers=1 + 2 * (i % 3 == 0), seed=i).bfloat16().float() for i in range(10)]
    for i, one in enumerate(given):
        log.record(one, token_ids=torch.full(one.shape[:2], i))
    assert sum(isinstance(entry.weights, torch.Tensor) for entry in log._entries) <= 3
    assert names(tmp_path / "spill")
    full = [one.expand(-1, -1, 3, -1) for one in given]
    assert_equal_lists(log.entries(), full)
    assert_equal_lists(pickle.loads(pickle.dumps(log)).entries(), full)
    duplicate = copy.deepcopy(log)
    log.flush(tmp_path / "out" / "log")
    gc.collect()
    assert names(tmp_path / "spill") == []
    assert_equal_lists(duplicate.entries(), full)
    assert_equal_lists([one[0] for one in load_scalings_log(tmp_path / "out" / "log")], full)
    tokens = [entry.tokens for entry in load_routing_log(tmp_path / "out").entries]
    assert [ids[0, 0] for ids in tokens if ids is not None] == list(range(10))


# ---- files
@pytest.mark.parametrize(
    ("shapes", "files"),
    [
        ([(2, 3), (2, 3)], ["log.npy"]),
        ([(2, 3), (2, 1), (2, 3), (2, 1)], ["log-2x1.npy", "log-2x3.npy", "log-mapping.json"]),
        ([(1, 3), (2, 3), (1, 3)], ["log-1x3.npy", "log-2x3.npy", "log-mapping.json"]),
        ([(1, 3), (2, 4), (2, 3)], ["log-1x3.npy", "log-2x3.npy", "log-2x4.npy", "log-mapping.json"]),
    ],
    ids=["one shape", "many lengths", "many batch sizes", "both"],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_flush_then_load_gives_the_same_forwards_in_the_same_order(tmp_path, shapes, files, mmap):
    log, given = filled(*shapes)
    written = log.flush(tmp_path / "deep" / "log")
    assert names(tmp_path / "deep") == sorted([*files, "index.json"])
    assert sorted(path.name for path in written) == names(tmp_path / "deep")
    assert len(log) == 0
    assert_equal_lists(load_scalings_log(tmp_path / "deep" / "log", mmap=mmap), [one[None] for one in given])


def test_the_mapping_names_files_as_given_and_rows_in_log_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, _ = filled((1, 3), (1, 1), (1, 3))
    log.flush("run/log")
    mapping = json.loads((tmp_path / "run/log-mapping.json").read_text())
    assert mapping == {"run/log-1x3.npy": [0, 2], "run/log-1x1.npy": [1]}


def test_a_trailing_npy_is_removed_and_other_dots_are_kept(tmp_path):
    log, given = filled((1, 2))
    log.flush(f"{tmp_path}/v1.2.npy", index=False)
    assert names(tmp_path) == ["v1.2.npy"]
    for path in (tmp_path / "v1.2", str(tmp_path / "v1.2.npy")):
        assert_equal_lists(load_scalings_log(path), [given[0][None]])


def test_a_log_loads_from_another_directory_and_after_its_folder_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, given = filled((1, 3), (1, 1))
    log.flush("run/log")
    os.rename("run", "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_equal_lists(load_scalings_log("../moved/log"), [one[None] for one in given])


def test_files_keyed_by_one_number_with_their_full_path_load(tmp_path):
    """As the original writes them: one file per length, its path as key."""
    one, two = scalings(1, 3).numpy(), scalings(1, 1).numpy()
    np.save(tmp_path / "log-3.npy", np.stack([one, one * 2]))
    (tmp_path / "elsewhere").mkdir()
    np.save(tmp_path / "elsewhere" / "log-1.npy", two[None])
    mapping = {"/gone/log-3.npy": [2, 0], str(tmp_path / "elsewhere" / "log-1.npy"): [1]}
    (tmp_path / "log-mapping.json").write_text(json.dumps(mapping))
    expected = [torch.from_numpy(x)[None] for x in (one * 2, two, one)]
    assert_equal_lists(load_scalings_log(tmp_path / "log"), expected)


def test_the_file_beside_the_mapping_wins_over_the_path_as_written(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    np.save(tmp_path / "old" / "log-1x3.npy", np.zeros((1, 1, 3, 3, 2), dtype=np.float32))
    np.save(tmp_path / "new" / "log-1x3.npy", np.ones((1, 1, 3, 3, 2), dtype=np.float32))
    (tmp_path / "new" / "log-mapping.json").write_text(json.dumps({str(tmp_path / "old/log-1x3.npy"): [0]}))
    assert load_scalings_log(tmp_path / "new" / "log")[0].min() == 1


@pytest.mark.parametrize("first", [[(1, 2)], [(1, 2), (1, 1)]])
@pytest.mark.parametrize("second", [[(1, 2)], [(2, 2), (1, 1)]])
def test_an_existing_log_is_kept_unless_overwritten_and_then_gone(tmp_path, first, second):
    log, _ = filled(*first)
    log.flush(tmp_path / "log")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "log-7x7.npy").write_bytes(b"not named by the mapping")
    log, new = filled(*second)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        log.flush(tmp_path / "log")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        log.flush(tmp_path / "log", index=False)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert_equal_lists(log.entries(), new)
    log.flush(tmp_path / "log", overwrite=True)
    assert_equal_lists(load_scalings_log(tmp_path / "log"), [one[None] for one in new])
    expected = {"log.npy"} if len(second) == 1 else {"log-2x2.npy", "log-1x1.npy", "log-mapping.json"}
    assert set(names(tmp_path)) == expected | {"index.json", "log-7x7.npy"}
    assert len(load_routing_log(tmp_path).entries) == len(second)


def test_when_writing_fails_the_old_files_and_the_log_stay(tmp_path, monkeypatch):
    log, _ = filled((1, 2), (1, 1))
    log.flush(tmp_path / "log")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    log, new = filled((3, 2), (1, 1))
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        log.flush(tmp_path / "log", overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_equal_lists(log.entries(), new)


def damage(tmp_path, how):
    log, _ = filled((1, 2), (1, 1), (1, 2))
    log.flush(tmp_path / "log")
    mapping = tmp_path / "log-mapping.json"
    if how == "gap":
        mapping.write_text(json.dumps({"log-1x2.npy": [0, 3], "log-1x1.npy": [1]}))
    elif how == "twice":
        mapping.write_text(json.dumps({"log-1x2.npy": [0, 1], "log-1x1.npy": [1]}))
    elif how == "row count":
        mapping.write_text(json.dumps({"log-1x2.npy": [0], "log-1x1.npy": [1]}))
    elif how == "not json":
        mapping.write_text("{")
    elif how == "not a mapping":
        mapping.write_text("[1]")
    elif how == "cut short":
        (tmp_path / "log-1x2.npy").write_bytes((tmp_path / "log-1x2.npy").read_bytes()[:-3])
    elif how == "empty":
        (tmp_path / "log-1x2.npy").write_bytes(b"")
    elif how == "pickled":
        np.save(tmp_path / "log-1x2.npy", np.array([{"a": 1}, 2], dtype=object), allow_pickle=True)
    elif how == "integers":
        np.save(tmp_path / "log-1x2.npy", np.zeros((2, 1, 2, 3, 2), dtype=np.int64))
    elif how == "four axes":
        np.save(tmp_path / "log-1x2.npy", np.zeros((2, 1, 2, 6), dtype=np.float32))


@pytest.mark.parametrize(
    "how",
    [
        "gap",
        "twice",
        "row count",
        "not json",
        "not a mapping",
        "cut short",
        "empty",
        "pickled",
        "integers",
        "four axes",
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, how):
    damage(tmp_path, how)
    with pytest.raises(ValueError, match="log-"):
        load_scalings_log(tmp_path / "log")


class Trap:
    """What runs if a pickle is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickled_array_is_refused_and_nothing_in_it_runs(tmp_path):
    array = np.empty((1, 1, 1, 1, 1), dtype=object)
    array[0, 0, 0, 0, 0] = Trap(str(tmp_path / "trapped"))
    np.save(tmp_path / "log.npy", array, allow_pickle=True)
    for mmap in (False, True):
        with pytest.raises(ValueError, match=r"log\.npy"):
            load_scalings_log(tmp_path / "log", mmap=mmap)
    assert not (tmp_path / "trapped").exists()


def test_a_second_log_beside_another_does_not_take_its_index(tmp_path):
    filled((1, 2))[0].flush(tmp_path / "log")
    before = (tmp_path / "index.json").read_bytes()
    log, _ = filled((1, 2))
    with pytest.raises(FileExistsError, match=r"index\.json"):
        log.flush(tmp_path / "other")
    log.flush(tmp_path / "other", index=False)
    assert (tmp_path / "index.json").read_bytes() == before
    log, _ = filled((1, 5))
    log.flush(tmp_path / "other", overwrite=True)
    assert load_routing_log(tmp_path).entries[0].weights.shape[1] == 5


def test_a_missing_log_and_a_missing_part_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_scalings_log(tmp_path / "nothing")
    damage(tmp_path, "none")
    (tmp_path / "log-1x1.npy").unlink()
    with pytest.raises(FileNotFoundError, match="log-1x1"):
        load_scalings_log(tmp_path / "log")


def test_verbose_says_which_files_are_read(tmp_path, capsys):
    damage(tmp_path, "none")
    load_scalings_log(tmp_path / "log", verbose=True)
    assert "log-1x2.npy: 2 forwards of 1x2x3x2" in capsys.readouterr().out


# ---- index
def test_the_index_gives_back_names_phases_tasks_tokens_and_texts(tmp_path):
    log, weights = new_log(), scalings(2, 3)
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    log.record(weights, token_ids=ids, mask=mask, task_names=["a", "b"], phase="eval")
    log.record(weights, mask=mask, phase="train")
    log.flush(tmp_path / "log", decode=lambda row: [f"<{token}>" for token in row])
    run = load_routing_log(tmp_path)
    assert (run.layer_names, run.expert_names, run.dropped) == (LAYERS, EXPERTS, 0)
    first, second = run.entries
    np.testing.assert_array_equal(first.weights, weights.numpy())
    assert first.tokens is not None
    assert first.tokens.tolist() == [[5, 6, 7], [8, 9, -1]]
    assert first.mask.tolist() == second.mask.tolist() == mask.bool().tolist()
    assert first.texts == (("<5>", "<6>", "<7>"), ("<8>", "<9>", ""))
    assert (first.task_names, first.phase) == (("a", "b"), "eval")
    assert (second.tokens, second.texts, second.task_names, second.phase) == (None, None, None, "train")


def test_the_index_is_written_last(tmp_path, monkeypatch):
    log, _ = filled((1, 2), (1, 1))
    seen = []
    write = __import__("mole.run_folder").run_folder.write_atomically

    def spy(path, data):
        seen.append((path.name, names(tmp_path)))
        write(path, data)

    monkeypatch.setattr("mole.routing.log.write_atomically", spy)
    monkeypatch.setattr("mole.routing.log_files.write_atomically", spy)
    log.flush(tmp_path / "log")
    assert seen[-1] == ("index.json", ["log-1x1.npy", "log-1x2.npy", "log-mapping.json"])


def test_a_decoder_that_joins_tokens_is_refused_before_anything_is_written(tmp_path):
    log = new_log()
    log.record(scalings(1, 3), token_ids=torch.ones(1, 3))
    with pytest.raises(ValueError, match="1 texts for 3"):
        log.flush(tmp_path / "log", decode=lambda row: ["all at once"])
    assert names(tmp_path) == []
    assert len(log) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"format": "something else"},
        {"entries": []},
        {"layer_names": ["one"]},
        {"entries": [{"phase": "x", "continues": False, "task_names": None, "tokens": None}]},
        {"entries": [{"phase": "eval", "continues": False, "task_names": ["a"], "tokens": None}]},
        {"entries": [{"phase": "eval", "continues": False, "task_names": None, "tokens": [[1]]}]},
        {"entries": [{"phase": "eval"}]},
        {"entries": 3},
    ],
)
def test_an_index_that_does_not_fit_its_arrays_is_refused(tmp_path, change):
    log, _ = filled((2, 3))
    log.flush(tmp_path / "log")
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(ValueError, match=r"index\.json"):
        load_routing_log(tmp_path)


def test_a_folder_without_index_is_no_log(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.json"):
        load_routing_log(tmp_path)


# ---- texts of one generate call
def generate(log, prompt, steps, batch=1, seed=0):
    weights = [scalings(batch, prompt, seed=seed), *(scalings(batch, 1, seed=seed + 1 + i) for i in range(steps))]
    for i, one in enumerate(weights):
        log.record(one, token_ids=torch.full(one.shape[:2], 10 + i), phase="decode" if i else "prefill")
    return weights


def test_the_forwards_of_one_generate_call_join_to_one_sequence(tmp_path):
    log = new_log()
    first, second = generate(log, 4, 3), generate(log, 2, 1, seed=10)
    expected = [torch.cat(first, dim=1), torch.cat(second, dim=1)]
    assert_equal_lists(log.sequences(), expected)
    log.flush(tmp_path / "log", decode=lambda row: [str(token) for token in row])
    one, two = load_routing_log(tmp_path).sequences()
    np.testing.assert_array_equal(one.weights, expected[0].numpy())
    assert one.phases == ("prefill",) * 4 + ("decode",) * 3
    assert one.texts == (("10", "10", "10", "10", "11", "12", "13"),)
    assert two.tokens is not None
    assert two.tokens.tolist() == [[10, 10, 11]]


def test_beams_are_followed_back_through_reorders(tmp_path):
    log = new_log()
    steps = [scalings(2, 2 if i == 0 else 1, seed=i) for i in range(3)]
    log.record(steps[0], phase="prefill")
    log.reorder(torch.tensor([1, 1]))
    log.record(steps[1], phase="decode")
    log.reorder([1, 0])
    log.reorder([0, 0])  # twice between two forwards: both count
    log.record(steps[2], phase="decode")
    expected = torch.stack(
        [torch.cat([steps[0][1], steps[1][1], steps[2][row]]) for row in range(2)]
    )  # both beams came from row 1 each time
    assert_equal_lists(log.sequences(), [expected])
    log.flush(tmp_path / "log")
    np.testing.assert_array_equal(load_routing_log(tmp_path).sequences()[0].weights, expected.numpy())


def test_a_sequence_whose_beginning_was_dropped_or_skipped_is_not_joined_to_another():
    log = new_log(max_entries=2)
    generate(log, 4, 3)
    assert [s.shape[1] for s in log.sequences()] == [2]
    log = new_log(every=2)
    generate(log, 4, 3)
    assert [s.shape[1] for s in log.sequences()] == [4, 1]
    log = new_log()
    generate(log, 4, 0)
    log.clear()
    generate(log, 1, 0)
    log.record(scalings(3, 1), phase="decode")  # another batch size: no beam of this text
    assert [tuple(s.shape[:2]) for s in log.sequences()] == [(1, 1), (3, 1)]


def test_rows_that_have_ended_count_as_padding_while_others_go_on(tmp_path):
    log = new_log()
    log.end_ids = (0, 2)
    log.record(scalings(2, 2), token_ids=torch.tensor([[2, 5], [2, 6]]), phase="prefill")
    log.record(scalings(2, 1), token_ids=torch.tensor([[2], [7]]), phase="decode")
    log.record(scalings(2, 1), token_ids=torch.tensor([[0], [8]]), phase="decode")
    log.flush(tmp_path / "log")
    (text,) = load_routing_log(tmp_path).sequences()
    assert text.mask.tolist() == [[True, True, False, False], [True, True, True, True]]


def test_buckets_group_by_length():
    log, given = filled((1, 2), (2, 3), (3, 2))
    buckets = log.buckets()
    assert {length: indices for length, (indices, _) in buckets.items()} == {2: [0, 2], 3: [1]}
    assert_equal_lists(buckets[2][1], [given[0], given[2]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scalings_on_a_gpu_arrive_whole(tmp_path):
    log, given = new_log(max_entries=2, spill_dir=tmp_path / "spill"), [scalings(2, 64, seed=i) for i in range(8)]
    for one in given:
        device = one.cuda().requires_grad_()
        log.record(device, token_ids=torch.ones(2, 64, dtype=torch.long, device="cuda"))
        device.detach().zero_()
    assert_equal_lists(log.entries(), given)
