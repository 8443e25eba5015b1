"""`training.samples`: what the model writes at each evaluation, in samples.jsonl, also of a run that goes on."""

import json

import pytest
from walk import SHORT, SMALL, data, mole

from mole.cli.main import main

WANTED = [*SHORT, "training.samples=2", "training.evaluate_every=2", "training.checkpoint_every=2"]


def generated(folder):
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "parts" in line]) == 4
    return [line for line in lines if "step" in line]


def test_the_first_validation_prompts_are_completed_at_each_evaluation(tmp_path):
    mole("train-expert", *SMALL, *WANTED, *data("reverse"), f"run.folder={tmp_path / 'run'}")
    lines = generated(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 0, 2, 2, 4, 4]
    assert {line["prompt"] for line in lines[:2]} == {line["prompt"] for line in lines[2:]}
    assert all(line["target"] and isinstance(line["completion"], str) for line in lines)


def test_a_run_that_goes_on_has_the_lines_of_one_that_was_never_stopped(tmp_path, monkeypatch):
    words = ["train-expert", *SMALL, *WANTED, *data("reverse")]
    mole(*words, f"run.folder={tmp_path / 'whole'}")

    def cut_short(*args, **kwargs):
        raise RuntimeError("the machine was switched off")

    with monkeypatch.context() as patched:
        patched.setattr("mole.commands.train_expert._keep", cut_short)
        assert main([*words, f"run.folder={tmp_path / 'run'}"]) == 1
    folder = tmp_path / "run" / "checkpoints"
    for checkpoint in folder.glob("step-4"):
        (checkpoint / "complete").unlink()
    mole("train-expert", "--resume", str(tmp_path / "run"))
    assert generated(tmp_path / "run") == generated(tmp_path / "whole")


def test_a_mixture_is_given_the_tasks_of_the_prompts(walk, tmp_path):
    chosen = [f"library={walk / 'library'}", "router=top_k", f"run.folder={tmp_path / 'run'}"]
    mole("build-moe", *SMALL, *WANTED, *data("reverse"), *chosen, "training.max_steps=2")
    assert [line["step"] for line in generated(tmp_path / "run")] == [0, 0, 2, 2]


@pytest.mark.parametrize("setting", ["dataset.validation_examples=0"])
def test_samples_need_prompts_that_were_held_out(tmp_path, capsys, setting):
    assert main(["train-expert", *SMALL, *WANTED, *data("reverse"), setting, f"run.folder={tmp_path / 'run'}"]) == 2
    assert "training.samples=2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
