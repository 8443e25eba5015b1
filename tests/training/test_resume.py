"""A run that was stopped, by whatever and whenever, ends as if it had not been."""

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_toy import ToyModel, fit_toy, lines, mean_loss, recipe, toy_data, weight_bytes

from mole.run_folder import RunFolder, RunStopped
from mole.training import CheckpointError, checkpoints
from mole.training.optimizers import AdafactorConfig, AdamWConfig, SGDConfig
from mole.training.schedules import CosineConfig, LinearConfig


def killed(folder: Path, mode: str, kills: int) -> dict:
    script = Path(__file__).with_name("killed_training.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder), mode, str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_as_if_never_killed(found: dict, least_kills: int) -> None:
    assert found["kills"] >= least_kills
    for run in found["killed"]:
        assert run["weights"] == found["whole"]["weights"], run.get("event")
        assert run["metrics"] == found["whole"]["metrics"], run.get("event")
        assert run["checkpoints"] == found["whole"]["checkpoints"], run.get("event")
        assert run["hidden"] == []


def test_a_run_killed_before_a_file_operation_ends_with_the_same_bytes(tmp_path):
    assert_as_if_never_killed(killed(tmp_path, "event", 3), least_kills=3)


@pytest.mark.slow
def test_a_run_killed_before_many_file_operations_ends_with_the_same_bytes(tmp_path):
    assert_as_if_never_killed(killed(tmp_path, "event", 40), least_kills=40)


@pytest.mark.slow
def test_a_run_killed_over_and_over_at_random_moments_ends_with_the_same_bytes(tmp_path):
    assert_as_if_never_killed(killed(tmp_path, "time", 12), least_kills=1)


class Interrupted(Exception):
    """What a test raises in the middle of a run."""


OPTIMIZERS = {
    "adamw": AdamWConfig(weight_decay=0.1),
    "sgd": SGDConfig(),
    "sgd_momentum": SGDConfig(momentum=0.9, nesterov=True),
    "adafactor": AdafactorConfig(),
}


def run_once(folder: Path, *, stop_at: int | None = None, **settings) -> ToyModel:
    """A run with dropout; at evaluation `stop_at` it breaks off."""
    model, data = ToyModel(dropout=0.3), toy_data()
    chosen = {
        "max_steps": 10,
        "learning_rate": 0.05,
        "evaluate_every": 1,
        "checkpoint_every": 2,
        "schedule": CosineConfig(),
        "optimizer": AdamWConfig(),
        **settings,
    }

    def evaluate(step: int) -> dict[str, float]:
        if step == stop_at:
            raise Interrupted
        return {"validation_loss": mean_loss(model, data.train[:3])}

    fit_toy(model, folder, recipe(**chosen), data, evaluate=evaluate, resume=True)
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_to_the_same_bytes(name, tmp_path):
    whole = run_once(tmp_path / "whole", optimizer=OPTIMIZERS[name])
    with pytest.raises(Interrupted):
        run_once(tmp_path / "broken", optimizer=OPTIMIZERS[name], stop_at=7)
    assert len(lines(tmp_path / "broken", "train")) == 7
    resumed = run_once(tmp_path / "broken", optimizer=OPTIMIZERS[name])
    assert weight_bytes(resumed) == weight_bytes(whole)
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")


def test_the_best_weights_survive_an_interruption(tmp_path):
    model, data = ToyModel(), toy_data()
    kept = {}

    def evaluate(step: int) -> dict[str, float]:
        kept.setdefault(step, weight_bytes(model))
        if step == 7 and not evaluated:
            evaluated.append(step)
            raise Interrupted
        return {"score": -abs(step - 3.0)}

    evaluated: list[int] = []
    config = recipe(max_steps=9, evaluate_every=1, checkpoint_every=2, keep_checkpoints=1, best_metric="score")
    with pytest.raises(Interrupted):
        fit_toy(model, tmp_path, config, data, evaluate=evaluate)
    result = fit_toy(model, tmp_path, config, data, evaluate=evaluate, resume=True)
    assert result.best_step == 3
    assert weight_bytes(model) == kept[3]


def test_a_finished_run_goes_on_to_more_steps(tmp_path):
    constant = {"evaluate_every": None, "schedule": LinearConfig()}
    run_once(tmp_path / "more", max_steps=4, **constant)
    run_once(tmp_path / "more", max_steps=8, **constant)
    rates = [row["learning_rate"] for row in lines(tmp_path / "more", "train")]
    run_once(tmp_path / "whole", max_steps=8, **constant)
    assert len(rates) == 8
    assert rates[4:] == [row["learning_rate"] for row in lines(tmp_path / "whole", "train")][4:]


def test_a_finished_run_that_is_resumed_changes_nothing(tmp_path):
    first = run_once(tmp_path, best_metric="validation_loss")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = run_once(tmp_path, best_metric="validation_loss")
    assert weight_bytes(again) == weight_bytes(first)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_checkpoints_is_not_used_for_a_new_run(tmp_path):
    run_once(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="has checkpoints up to step-10: continue that run with --resume"):
        fit_toy(ToyModel(), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# ---- checkpoints
def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    config = recipe(max_steps=9, evaluate_every=1, checkpoint_every=1, best_metric="score")
    fit_toy(ToyModel(), tmp_path, config, evaluate=lambda step: {"score": -abs(step - 3.0)})
    assert names(tmp_path) == ["step-3", "step-8", "step-9"]


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path):
    run_once(tmp_path)
    files = sorted(path.name for path in (tmp_path / "checkpoints/step-10").iterdir())
    assert files == ["complete", "optimizer.safetensors", "state.json", "weights.safetensors"]
    assert json.loads((tmp_path / "checkpoints/step-10/state.json").read_text())["step"] == 10


def tear_complete(folder: Path) -> None:
    (folder / "complete").unlink()


def tear_weights(folder: Path) -> None:
    data = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(data[:-8])


def tear_state(folder: Path) -> None:
    (folder / "state.json").write_text("{" * (folder / "state.json").stat().st_size)


def tear_by_losing_a_file(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


@pytest.mark.parametrize("tear", [tear_complete, tear_weights, tear_state, tear_by_losing_a_file])
def test_a_torn_checkpoint_is_passed_over_with_a_message(tear, tmp_path, caplog):
    whole = run_once(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_once(tmp_path / "broken", stop_at=7)
    assert names(tmp_path / "broken") == ["step-4", "step-6"]
    tear(tmp_path / "broken/checkpoints/step-6")
    with caplog.at_level(logging.WARNING):
        resumed = run_once(tmp_path / "broken")
    assert "step-6 passed over" in caplog.text
    assert names(tmp_path / "broken") == ["step-10", "step-8"]
    assert weight_bytes(resumed) == weight_bytes(whole)
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")


def test_a_metrics_file_that_was_cut_is_an_error(tmp_path):
    run_once(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has 0 bytes, but the checkpoint was written after"):
        run_once(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run_once(tmp_path)
    with pytest.raises(ValueError, match=r"another model \(mix: \(8, 8\) in it, \(9, 9\) here"):
        fit_toy(ToyModel(width=9), tmp_path, recipe(max_steps=20), resume=True)


# ---- signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_a_checkpoint_and_the_run_goes_on_to_the_same_bytes(number, tmp_path):
    whole = run_once(tmp_path / "whole", evaluate_every=None, checkpoint_every=None)
    model, seen = ToyModel(dropout=0.3), []
    settings = {"max_steps": 10, "learning_rate": 0.05, "schedule": CosineConfig(), "optimizer": AdamWConfig()}

    def signal_in_step_5(*_: object) -> None:
        if model.training and len(seen) < 5:
            seen.append(0)
            if len(seen) == 5:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    model.dropout.register_forward_hook(signal_in_step_5)
    with pytest.raises(RunStopped) as stopped:
        fit_toy(model, tmp_path / "stopped", recipe(**settings))
    assert signal.getsignal(number) is before
    assert (stopped.value.signal_number, stopped.value.checkpoint) == (number, tmp_path / "stopped/checkpoints/step-5")
    fit_toy(model, tmp_path / "stopped", recipe(**settings), resume=True)
    assert weight_bytes(model) == weight_bytes(whole)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole", "train")


def test_a_signal_before_step_1_stops_without_a_checkpoint(tmp_path):
    def evaluate(step: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"score": 0.0}

    with pytest.raises(RunStopped) as stopped:
        fit_toy(ToyModel(), tmp_path, evaluate=evaluate)
    assert stopped.value.checkpoint is None
    assert names_or_none(tmp_path) == []


def names_or_none(folder: Path) -> list[str]:
    return names(folder) if (folder / "checkpoints").exists() else []


def test_a_signal_in_the_last_evaluation_is_not_swallowed(tmp_path):
    def evaluate(step: int) -> dict[str, float]:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"score": 0.0}

    with pytest.raises(RunStopped) as stopped:
        fit_toy(ToyModel(), tmp_path, evaluate=evaluate)
    assert stopped.value.checkpoint == tmp_path / "checkpoints/step-4"


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    def evaluate(step: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on after the second Ctrl-C")

    with pytest.raises(KeyboardInterrupt):
        fit_toy(ToyModel(), tmp_path, evaluate=evaluate)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- a full disk
@pytest.fixture
def full_disk(monkeypatch):
    """A disk that is full when checkpoints of the given steps are written."""
    whole = checkpoints.save_file

    def fill(*steps: int) -> None:
        def save_file(tensors, path):
            if any(f".step-{step}." in str(path) for step in steps) and "optimizer" in str(path):
                Path(path).write_bytes(b"part")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            whole(tensors, path)

        monkeypatch.setattr(checkpoints, "save_file", save_file)

    return fill


def test_a_disk_that_was_full_for_a_while_changes_nothing(full_disk, tmp_path, caplog):
    whole = run_once(tmp_path / "whole")
    full_disk(4, 6)
    with caplog.at_level(logging.WARNING):
        model = run_once(tmp_path / "full")
    assert "No space left on device" in caplog.text
    assert f"the last good checkpoint is {tmp_path}/full/checkpoints/step-2; going on" in caplog.text
    assert weight_bytes(model) == weight_bytes(whole)
    assert names(tmp_path / "full") == ["step-10", "step-8"]


def test_a_disk_that_stays_full_ends_the_run_naming_the_last_good_checkpoint(full_disk, tmp_path):
    whole = run_once(tmp_path / "whole")
    full_disk(6, 8, 10)
    with pytest.raises(CheckpointError, match=r"step-10 cannot be written.*last good checkpoint is .*step-4: free"):
        run_once(tmp_path / "full")
    assert names(tmp_path / "full") == ["step-2", "step-4"]
    assert list((tmp_path / "full").rglob(".*")) == []
    full_disk()
    assert weight_bytes(run_once(tmp_path / "full")) == weight_bytes(whole)
    assert lines(tmp_path / "full") == lines(tmp_path / "whole")


def test_best_weights_that_found_no_room_are_in_the_next_checkpoint(full_disk, tmp_path):
    def scores(step: int) -> dict[str, float]:
        kept.setdefault(step, weight_bytes(model))
        if step == 6 and not broken:
            broken.append(step)
            raise Interrupted
        return {"score": -abs(step - 3.0)}

    model, kept, broken = ToyModel(), {}, []
    often = {"evaluate_every": 1, "checkpoint_every": 2, "best_metric": "score"}
    config = recipe(max_steps=7, optimizer=AdamWConfig(), **often)
    full_disk(3)
    with pytest.raises(Interrupted):
        fit_toy(model, tmp_path, config, evaluate=scores)
    assert (tmp_path / "checkpoints/step-4/best.safetensors").is_file()
    assert fit_toy(model, tmp_path, config, evaluate=scores, resume=True).best_step == 3
    assert weight_bytes(model) == kept[3]


def test_a_real_limit_on_file_sizes_loses_nothing(tmp_path):
    """Files may not grow over 4 kB from step 5 on: real writes fail, of checkpoints and of metrics."""
    whole = run_once(tmp_path / "whole", max_steps=30, evaluate_every=None)
    model = ToyModel(dropout=0.3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    steps = []

    def limit_in_step_5(*_: object) -> None:
        steps.append(0)
        if len(steps) == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    handle = model.dropout.register_forward_hook(limit_in_step_5)
    settings = {"max_steps": 30, "learning_rate": 0.05, "checkpoint_every": 2, "schedule": CosineConfig()}
    config = recipe(**settings, optimizer=AdamWConfig())
    try:
        with pytest.raises(CheckpointError, match="last good checkpoint is .*step-4"):
            fit_toy(model, tmp_path / "full", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path / "full") == ["step-2", "step-4"]
    handle.remove()
    fit_toy(model, tmp_path / "full", config, resume=True)
    assert weight_bytes(model) == weight_bytes(whole)
    assert lines(tmp_path / "full") == lines(tmp_path / "whole", "train")


def test_a_checkpoint_holds_what_a_router_keeps_beside_its_weights(tmp_path):
    class Counting(ToyModel):
        """Keeps a running figure in a buffer, and one that is not saved."""

        def __init__(self):
            super().__init__()
            self.register_buffer("load", torch.zeros(()))
            self.register_buffer("scratch", torch.zeros(()), persistent=False)

        def forward(self, input_ids, attention_mask=None):
            if self.training:
                self.load += 1
            return super().forward(input_ids)

    fit_toy(Counting(), tmp_path, recipe(max_steps=3))
    weights = checkpoints.read(RunFolder(tmp_path).checkpoint(3)).weights
    assert weights["load"].item() == 3
    assert "scratch" not in weights
    again = Counting()
    fit_toy(again, tmp_path, recipe(max_steps=5), resume=True)
    assert again.load.item() == 5


@pytest.mark.parametrize("changed", ["frozen weights", "training data"])
def test_a_run_goes_on_only_over_what_it_began_with(changed, tmp_path):
    settings = recipe(max_steps=4, checkpoint_every=2)
    fit_toy(ToyModel(), tmp_path, settings, toy_data())
    model = ToyModel()
    if changed == "frozen weights":
        model.embedding.data[0, 0] += 1.0
    data = toy_data(seed=1) if changed == "training data" else toy_data()
    with pytest.raises(ValueError, match=f"the {changed} of this run are not those that it began with"):
        fit_toy(model, tmp_path, recipe(max_steps=6, checkpoint_every=2), data, resume=True)
    fit_toy(ToyModel(), tmp_path, recipe(max_steps=6, checkpoint_every=2), toy_data(), resume=True)
