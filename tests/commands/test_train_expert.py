"""What a run of train-expert keeps and what it says of it, and the runs whose result is not sound."""

import json

import pytest
from walk import SHORT, SMALL, data, mole, train

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
