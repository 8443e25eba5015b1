"""`dry_run=true`: one step is rehearsed, nothing is kept, and the memory that is told is the memory that is taken."""

import pytest
import torch
from walk import SHORT, SMALL, data, mole

from mole import adapters, backbones
from mole import data as sources
from mole.cli.main import main
from mole.data import IGNORED, Sample
from mole.training import TrainingConfig, TrainingFailed, make_accelerator, rehearse


def test_an_expert_is_rehearsed_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, *SHORT, *data("reverse"), f"library={tmp_path / 'library'}", "name=x"]
    mole("train-expert", *words, "dry_run=true")
    shown = capsys.readouterr().out
    assert "first sample: " in shown
    assert "nothing is kept" in shown
    assert "parameters (" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_router_is_rehearsed_and_nothing_is_left(walk, tmp_path, capsys):
    words = [*SMALL, *SHORT, *data("reverse"), f"library={walk / 'library'}", "router.size=16"]
    mole("xlora-train", *words, "dry_run=true", f"run.folder={tmp_path / 'runs' / 'one'}")
    assert "nothing is kept" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["build-moe", "router=uniform", "dry_run=true"], "learns nothing"),
        (["train-expert", "dry_run=true", "run.resume=auto"], "continues nothing"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(walk, tmp_path, capsys, words, says):
    command, *rest = words
    rest += [f"library={walk / 'library'}", *SMALL, *data("reverse"), f"run.folder={tmp_path / 'run'}"]
    assert main([command, *rest]) == 2
    assert says in capsys.readouterr().err


def trained_and_batch(rows, length=24):
    model = backbones.load(backbones.TinyConfig(device="cpu")).model
    adapters.attach(model, adapters.LoraConfig(), seed=0)
    ids = tuple(range(5, 5 + length))
    samples = [Sample(ids, (IGNORED, *ids[1:]), "t", "", "", ids[:1])] * rows
    return model, sources.collate(samples, pad_token_id=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_activations_of_a_micro_batch_follow_from_one_row(checkpointing):
    training = TrainingConfig(gradient_checkpointing=checkpointing)
    accelerator = make_accelerator(training, torch.device("cpu"))
    found = {}
    for rows in (1, 6):
        model, batch = trained_and_batch(rows)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        found[rows] = rehearse(model, batch, training, accelerator, rows=6)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())
    assert found[1].activations == pytest.approx(found[6].activations, rel=0.25)
    assert found[1].loss == pytest.approx(found[6].loss, rel=1e-5)
    assert found[1].optimizer == 3 * 4 * found[1].trained


def test_a_loss_that_is_not_finite_is_told():
    training = TrainingConfig()
    model, batch = trained_and_batch(1)
    torch.nn.init.constant_(next(iter(model.parameters())), float("nan"))
    with pytest.raises(TrainingFailed, match="the loss is nan"):
        rehearse(model, batch, training, make_accelerator(training, torch.device("cpu")), rows=1)


def test_checkpointing_keeps_less_for_backward():
    told = {}
    for checkpointing in (False, True):
        training = TrainingConfig(gradient_checkpointing=checkpointing)
        model, batch = trained_and_batch(2, length=64)
        told[checkpointing] = rehearse(model, batch, training, make_accelerator(training, torch.device("cpu")), rows=2)
    assert told[True].activations < 0.5 * told[False].activations
