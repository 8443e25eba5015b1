"""The scalings log through the model: what is kept, what files it leaves, and that they load in order."""

import json

import numpy as np
import pytest
import torch
from xlora_cases import SITES, build, ids, llama, logits

from mole import xlora
from mole.xlora import xlora_utils


def test_each_forward_is_kept_detached_in_float32(folders):
    model = build(folders, llama(torch.bfloat16), top_k_lora=1, global_scaling_weight=3.0)
    model.enable_scalings_logging()
    model(ids())
    (entry,) = model.get_scalings_log()
    assert entry.shape == (2, 9, SITES, 3)
    assert entry.dtype == torch.float32
    assert not entry.requires_grad
    torch.testing.assert_close(entry.sum(-1), torch.ones(2, 9, SITES))  # before top-k and the global weight
    torch.testing.assert_close(entry, model.get_latest_scalings())


def test_disabled_forwards_are_not_kept_and_the_list_is_a_copy(model):
    model.enable_scalings_logging()
    with model.disable_adapter():
        logits(model)
    assert model.get_scalings_log() == []
    logits(model)
    model.get_scalings_log().clear()
    assert len(model.get_scalings_log()) == 1
    model.clear_scalings_log()
    assert model.get_scalings_log() == []


def test_stopping_keeps_the_log_as_later_versions_did_or_clears_it_as_the_first(model):
    model.enable_scalings_logging()
    logits(model)
    model.disable_scalings_logging()
    logits(model)
    assert len(model.get_scalings_log()) == 1
    model.enable_scalings_logging()
    logits(model)
    assert len(model.get_scalings_log()) == 2
    model.disable_scalings_logging(clear=True)
    assert model.get_scalings_log() == []


def test_generate_logs_the_prompt_then_one_token_per_step(model):
    model.enable_scalings_logging()
    model.generate(ids(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert [entry.shape[1] for entry in model.get_scalings_log()] == [9, 1, 1, 1]
    (joined,) = model.get_scalings_sequences()
    assert joined.shape == (2, 12, SITES, 3)
    lengths = {length: places for length, (places, _) in model.get_bucketed_scalings_log().items()}
    assert lengths == {9: [0], 1: [1, 2, 3]}
    model.clear_scalings_log()
    model.generate(ids(), max_new_tokens=3, do_sample=False, use_cache=False, eos_token_id=None)
    assert [entry.shape[1] for entry in model.get_scalings_log()] == [9, 10, 11]


@pytest.mark.parametrize(
    ("shapes", "files"),
    [
        ([(2, 9), (2, 9)], {"log.npy"}),
        ([(2, 9), (2, 5), (2, 9)], {"log-2x9.npy", "log-2x5.npy", "log-mapping.json"}),
        ([(1, 4), (3, 4)], {"log-1x4.npy", "log-3x4.npy", "log-mapping.json"}),
        ([(1, 4), (3, 2), (1, 4), (2, 2)], {"log-1x4.npy", "log-3x2.npy", "log-2x2.npy", "log-mapping.json"}),
    ],
    ids=["one shape", "lengths", "batches", "both"],
)
def test_flushed_files_load_in_order(model, tmp_path, shapes, files, monkeypatch):
    model.enable_scalings_logging()
    for rows, length in shapes:
        model(ids(rows, length))  # under autograd
    want = model.get_scalings_log()
    folder = tmp_path / "deep" / "er"
    model.flush_log_scalings(folder / "log.npy")
    assert {path.name for path in folder.iterdir()} == files
    assert model.get_scalings_log() == []
    folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    for load in (xlora.load_scalings_log, xlora_utils.load_scalings_log):
        for path in ("log", tmp_path / "moved" / "log.npy"):
            loaded = load(path, True)
            assert all(torch.equal(got[0], entry) for got, entry in zip(loaded, want, strict=True))


def test_flushing_says_when_it_cannot(model, tmp_path):
    with pytest.raises(RuntimeError, match="Scalings logging is disabled!"):
        model.flush_log_scalings(tmp_path / "log")
    model.enable_scalings_logging()
    with pytest.raises(ValueError, match=r"No log scalings to flush\."):
        model.flush_log_scalings(tmp_path / "log")
    logits(model)
    model.disable_scalings_logging()
    with pytest.raises(RuntimeError, match="disabled"):
        model.flush_log_scalings(tmp_path / "log")
    model.flush_log_scalings(tmp_path / "log", allow_disabled=True)
    model.enable_scalings_logging()
    logits(model)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.flush_log_scalings(tmp_path / "log")
    assert len(model.get_scalings_log()) == 1
    model.flush_log_scalings(tmp_path / "log", overwrite=True, index=True)
    assert {path.name for path in tmp_path.iterdir()} == {"log.npy", "index.json"}


def test_files_of_the_original_load(tmp_path, monkeypatch):
    """Its keys are by batch size or length, written as full paths from another working directory."""
    first, second = np.zeros((2, 1, 4, 6, 3), np.float32), np.ones((1, 1, 7, 6, 3), np.float32)
    np.save(tmp_path / "log-4.npy", first)
    np.save(tmp_path / "log-7.npy", second)
    mapping = {"./gone/log-4.npy": [0, 2], "./gone/log-7.npy": [1]}
    (tmp_path / "log-mapping.json").write_text(json.dumps(mapping))
    loaded = xlora.load_scalings_log(str(tmp_path / "log"))
    assert [tuple(entry.shape) for entry in loaded] == [(1, 1, 4, 6, 3), (1, 1, 7, 6, 3), (1, 1, 4, 6, 3)]


def test_limits_act_and_can_be_changed(model):
    model.enable_scalings_logging(max_entries=2)
    for _ in range(5):
        logits(model)
    assert len(model.get_scalings_log()) == 2
    assert model.scalings_log.dropped == 3
    model.enable_scalings_logging(max_entries=None, every=2)
    for _ in range(4):
        logits(model)
    assert len(model.get_scalings_log()) == 4
    with pytest.raises(ValueError, match="max_bytes"):
        model.enable_scalings_logging(max_bytes=0)
