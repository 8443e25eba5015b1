"""Two processes on the CPU do what one does, for the same global batch."""

import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from training_toy import lines
from two_processes import MODELS, train, worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, dict]:
    """One launch of two processes: the folder with all their runs, and what each rank returned."""
    root = tmp_path_factory.mktemp("two")
    setup = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        monitor_interval=0.1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONWARNINGS", "error")
        return root, elastic_launch(setup, worker)(str(root))


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_give_the_weights_of_one(name, launched, tmp_path):
    root, ranks = launched
    one = train(name, tmp_path)
    two = torch.load(root / f"{name}-0.pt", weights_only=True)
    for key, mine in one.state_dict().items():
        assert float((mine - two[key]).abs().max()) < 1e-12, key
    assert ranks[0][name] == ranks[1][name]


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_log_what_one_does(name, launched, tmp_path):
    train(name, tmp_path)
    alone, together = lines(tmp_path), lines(launched[0] / name)
    assert len(alone) == len(together)
    for mine, theirs in zip(alone, together, strict=True):
        assert mine.pop("phase") == theirs.pop("phase")
        assert mine == pytest.approx(theirs, rel=1e-9)


def test_an_expert_that_nobody_chose_stays_as_it_was(launched):
    untouched = MODELS["top_one"]().experts[2]
    assert torch.equal(torch.load(launched[0] / "top_one-0.pt", weights_only=True)["experts.2"], untouched)


def test_dropout_differs_between_the_processes(launched):
    ranks = launched[1]
    assert ranks[0]["dropout"] != ranks[1]["dropout"]


def test_the_main_process_alone_watches(launched):
    assert [launched[1][rank]["watched"] for rank in (0, 1)] == [[0, 1, 2], []]


def test_a_signal_to_one_process_stops_both_after_the_same_step(launched):
    root, ranks = launched
    for found in ranks.values():
        assert found["stopped"] == [signal.SIGTERM, str(root / "stopped/checkpoints/step-3")]


def test_a_run_of_two_processes_goes_on_with_one(launched, tmp_path, caplog):
    resumed = train("plain", launched[0] / "continued", steps=4, resume=True)
    assert "written by 2 processes and goes on with 1" in caplog.text
    whole = train("plain", tmp_path)
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert float((mine - theirs).detach().abs().max()) < 1e-12
