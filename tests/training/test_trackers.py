"""Trackers: fed with what metrics.jsonl has, closed however the run ends, and missing ones named."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from training_toy import ToyModel, fit_toy, recipe

from mole.registry import TRACKERS
from mole.training import trackers
from mole.training.trackers import TensorBoardConfig, WandbConfig, tracking


@pytest.fixture
def recorded(monkeypatch):
    """A tracker that writes down what it is told, in TensorBoard's place."""
    told = []
    fake = SimpleNamespace(
        start=lambda: told.append("start"),
        log=lambda values, step: told.append((step, values)),
        finish=lambda: told.append("finish"),
    )
    monkeypatch.setattr(trackers.TRACKERS, "build", lambda config, folder: fake)
    return told


def test_a_tracker_gets_every_logged_step_and_evaluation_and_is_closed(recorded, tmp_path):
    fit_toy(ToyModel(), tmp_path, recipe(max_steps=2), evaluate=lambda step: {"score": 1.0})
    assert recorded[0] == "start"
    assert recorded[-1] == "finish"
    assert [entry[0] for entry in recorded[1:-1]] == [0, 1, 2, 2]
    assert {"train/loss", "train/learning_rate", "train/tokens_per_second"} <= set(recorded[2][1])
    assert recorded[1][1] == {"evaluation/score": 1.0}


def test_a_tracker_is_closed_when_the_run_fails(recorded, tmp_path):
    def evaluate(step: int) -> dict[str, float]:
        raise OSError("no luck")

    with pytest.raises(OSError, match="no luck"):
        fit_toy(ToyModel(), tmp_path, evaluate=evaluate)
    assert recorded == ["start", "finish"]


def test_other_processes_open_no_tracker(recorded, tmp_path):
    with tracking(TensorBoardConfig(), tmp_path, active=False) as track:
        track({"loss": 1.0}, 1)
    assert recorded == []


@pytest.mark.parametrize("config", [TensorBoardConfig(), WandbConfig()], ids=["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_names_its_extra(config, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"pip install 'mole-experts\[{config.name}\]', or use tracker=none"):
        fit_toy(ToyModel(), tmp_path, recipe(tracker=config))


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
def test_tensorboard_writes_its_files_into_the_run(tmp_path):
    fit_toy(ToyModel(), tmp_path, recipe(tracker=TensorBoardConfig()))
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_the_trackers_are_these():
    assert TRACKERS.names() == ["none", "tensorboard", "wandb"]
