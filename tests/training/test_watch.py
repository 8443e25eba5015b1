"""Who watches the weights while they are trained, such as a log of learned weights."""

import shutil

from training_toy import ToyModel, fit_toy, lines, recipe, weight_bytes

from mole.routing.weights_log import WeightsLog


def test_a_watcher_sees_the_weights_before_the_first_step_and_after_each(tmp_path):
    model, seen = ToyModel(), []
    before = weight_bytes(model)
    config = recipe(max_steps=3, evaluate_every=2, log_every=2)
    watch = lambda step, epoch: seen.append((step, epoch, weight_bytes(model)))  # noqa: E731
    fit_toy(model, tmp_path, config, evaluate=lambda step: {"score": 1.0}, watch=watch)
    assert [(step, epoch) for step, epoch, _ in seen] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]
    assert seen[0][2] == before
    assert seen[-1][2] == weight_bytes(model)
    assert len({held for *_, held in seen}) == 4


def test_watching_changes_nothing_that_is_learnt(tmp_path):
    alone, watched = ToyModel(dropout=0.5), ToyModel(dropout=0.5)
    fit_toy(alone, tmp_path / "alone")
    fit_toy(watched, tmp_path / "watched", watch=lambda step, epoch: None)
    assert weight_bytes(alone) == weight_bytes(watched)
    assert lines(tmp_path / "alone") == lines(tmp_path / "watched")


def test_a_watcher_of_a_run_that_goes_on_begins_at_the_restored_step(tmp_path):
    def watched(steps, **more):
        model, seen = ToyModel(), []
        config = recipe(max_steps=steps, checkpoint_every=2)
        fit_toy(model, tmp_path, config, watch=lambda step, _: seen.append((step, weight_bytes(model))), **more)
        return dict(seen)

    first, again = watched(4), watched(6, resume=True)
    assert list(again) == [4, 5, 6]
    assert again[4] == first[4]


def test_a_log_of_weights_of_a_run_that_was_stopped_is_that_of_one_that_was_not(tmp_path):
    def logged(folder, steps, **more):
        model = ToyModel()
        log = WeightsLog(folder / "w.jsonl", branches=["bias"], sites=["out"], sets={"set_00": [0]}, every=2, **more)

        def watch(step, epoch):
            log.see(step, epoch, {"set_00": {"bias": model.bias[0].item()}})

        fit_toy(model, folder, recipe(max_steps=steps, checkpoint_every=3), watch=watch, **more)
        return (folder / "w.jsonl").read_bytes()

    logged(tmp_path / "again", 5)
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-5")  # what comes after step 3 is done again
    assert logged(tmp_path / "again", 8, resume=True) == logged(tmp_path / "whole", 8)
