"""What a run of train-expert keeps and what it says of it, and the runs whose result is not sound."""

import json

import pytest
import torch
from walk import SHORT, SMALL, data, mole

from mole.adapters import Adapter, LoraWeights
from mole.cli.main import main
from mole.commands import learned
from mole.experts import load_expert

IDLE = "training.learning_rate=1e-46"


def words(folder, *more):
    return ["train-expert", *SMALL, *SHORT, *data("reverse"), f"run.folder={folder}", "training.max_steps=1", *more]


# ---- what the card says
@pytest.mark.parametrize("setting", ["dataset.validation_examples=0", "training.best_metric=null"])
def test_a_run_that_chooses_no_step_keeps_its_last_weights(tmp_path, setting):
    mole(*words(tmp_path / "run", setting))
    card = load_expert(tmp_path / "run").card
    assert card.training["steps"] == 1
    assert "best_step" not in card.training
    assert bool(card.scores) == ("best_metric" in setting)


def test_a_score_counts_the_samples_that_it_is_of(tmp_path):
    mole(*words(tmp_path / "run", "training.validation_examples=2"))
    mole(*words(tmp_path / "whole"))
    (part,), (whole,) = (load_expert(tmp_path / name).card.scores for name in ("run", "whole"))
    assert (part["examples"], whole["examples"]) == (2, 4)
    assert part["config"] != whole["config"]


# ---- what has learned nothing
def test_an_expert_that_learned_nothing_is_rejected_and_doctor_says_so(tmp_path, capsys):
    folder, library = tmp_path / "run", tmp_path / "library"
    assert main(words(folder, IDLE, f"library={library}")) == 1
    assert "has learned nothing" in capsys.readouterr().err
    assert (folder / "expert.rejected" / "expert.json").is_file()
    assert not (folder / "expert").exists()
    assert not library.exists()
    assert main(["doctor", str(folder), "--json"]) == 1
    found = {entry["about"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["expert.rejected"]["state"] == "wrong"
    assert "B is zero" in found["expert.rejected"]["text"]


def test_an_adapter_that_starts_away_from_zero_is_measured_by_its_start(tmp_path, capsys):
    assert main(words(tmp_path / "run", IDLE, "adapter=prefix")) == 1
    assert "as they were at the start" in capsys.readouterr().err


def adapter(*parts):
    rows = {f"layers.{i}": LoraWeights(torch.full((2, 4), a), torch.full((4, 2), b), 1.0) for i, (a, b) in parts}
    return Adapter("lora", rows)


def test_each_module_has_to_learn_but_one_that_cannot():
    start = adapter((0, (1.0, 0.0)), (1, (1.0, 0.0)), (2, (0.0, 0.0)))
    learned.check_adapter(start, adapter((0, (1.0, 0.1)), (1, (1.0, 0.1)), (2, (0.0, 0.0))))
    with pytest.raises(ValueError, match=r"1 of 3 modules .* \(layers.1\)"):
        learned.check_adapter(start, adapter((0, (1.0, 0.1)), (1, (0.9, 0.0)), (2, (0.0, 0.0))))


def test_a_router_that_learned_nothing_is_rejected(walk, tmp_path, capsys):
    common = [*SMALL, *SHORT, *data("reverse"), f"library={walk / 'library'}", f"run.folder={tmp_path / 'run'}"]
    assert main(["build-moe", *common, "router=top_k", "training.max_steps=1", IDLE]) == 1
    assert "the router has learned nothing" in capsys.readouterr().err
    assert (tmp_path / "run" / "mixture.rejected" / "mixture.json").is_file()
    assert not (tmp_path / "run" / "mixture").exists()


# ---- what it leaves beside
def test_the_loss_is_drawn(walk):
    pytest.importorskip("matplotlib")
    assert [path.name for path in (walk / "reverse" / "plots").iterdir()] == ["loss.png"]


# ---- settings beside expert=
def again(walk, folder, *more):
    return words(folder, f"expert={walk / 'library' / 'reverse'}", "name=more", *more)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["adapter.rank=64"], "adapter.rank=64 (it has 8)"),
        (["adapter=dora"], "adapter=dora (it is lora)"),
        (["adapter=prefix"], "adapter=prefix (it is lora)"),
        (["adapter.init=gaussian", "adapter.dropout=0.5"], "adapter.dropout=0.5 (it has 0), adapter.init=gaussian"),
    ],
)
def test_settings_that_the_expert_does_not_have_are_refused_by_name(walk, tmp_path, capsys, settings, told):
    assert main(again(walk, tmp_path / "run", *settings)) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_that_the_expert_has_may_be_given(tmp_path):
    own = ["adapter.rank=4", "adapter.targets=[q_proj,v_proj]"]
    mole(*words(tmp_path / "first", *own))
    for name, settings in (("plain", []), ("same", own)):
        mole(*words(tmp_path / name, f"expert={tmp_path / 'first'}", *settings))
        assert {part.rank for part in load_expert(tmp_path / name).adapter.modules.values()} == {4}
