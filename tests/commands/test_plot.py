"""`mole plot`, end to end in process: a run folder in, PNG files out."""

import json

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

pytest.importorskip("matplotlib")

from mole.commands import plot
from mole.routing.log import RoutingLog


@pytest.fixture
def a_run(tmp_path):
    log = RoutingLog(["model.layers.0.q_proj"], ["sums", "words"])
    weights = torch.tensor([0.25, 0.75]).expand(1, 3, 1, 2)
    log.record(weights, token_ids=torch.tensor([[1, 2, 3]]), task_names=["words"], phase="prefill")
    log.flush(tmp_path / "scalings" / "log", decode=lambda ids: ["a", " b", " c"])
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "train", "loss": 1.0}) + "\n")
    return tmp_path


def validated(**node):
    return TypeAdapter(plot.Plot).validate_json(json.dumps(node))


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_all_plots_that_the_logs_allow_are_left_in_the_run(a_run, capsys):
    assert plot.run(validated(run=str(a_run))) is None
    left = ["plots/layers.png", "plots/loss.png", "plots/tasks.png", "plots/tokens.png"]
    assert files_in(a_run) == sorted(["metrics.jsonl", "scalings/index.json", "scalings/log.npy", *left])
    assert sorted(capsys.readouterr().out.split()) == [str(a_run / name) for name in left]


def test_chosen_plots_go_to_the_chosen_folder(a_run, tmp_path):
    plot.run(validated(run=str(a_run), plots=["tokens", "loss"], to=str(tmp_path / "out"), entry=-1, row=0, layer=0))
    assert files_in(tmp_path / "out") == ["loss.png", "tokens.png"]
    assert not (a_run / "plots").exists()


def test_a_plot_that_the_logs_do_not_allow_is_an_error_and_leaves_nothing(a_run):
    (a_run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="loss: .*metrics.jsonl"):
        plot.run(validated(run=str(a_run), plots=["loss", "layers"]))
    assert not (a_run / "plots").exists()


@pytest.mark.parametrize("node", [{}, {"run": "x", "plots": ["lines"]}, {"run": "x", "row": -1}, {"run": "x", "k": 1}])
def test_what_the_schema_does_not_know_is_refused(node):
    with pytest.raises(ValidationError):
        validated(**node)
