"""Routers without training and LoraHub, from the command line: what each run leaves."""

import json
import random
import shutil
import sys

import pytest
import torch
from walk import SMALL, data, files, mole

from mole import backbones
from mole.backbones.tiny_backbone import TinyConfig
from mole.cli.main import main
from mole.commands import lorahub
from mole.commands.library.opening import open_library
from mole.experts import load_expert
from mole.mixtures import open_model

RUN = {"config.yaml", "run.json", "log.txt"}
QUIET = ["log_examples=0"]


@pytest.fixture
def backbone():
    return backbones.load(TinyConfig(device="cpu"))


def outside(found: set[str], *folders: str) -> set[str]:
    return {name for name in found if not name.startswith(tuple(f"{folder}/" for folder in folders))}


def slowly(*values):
    """A case of the whole suite only: each builds a mixture, writes it and reads it back."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "words",
    [
        ["router=arrow"],
        slowly(["router=arrow", "router.general_experts=[shouting]"]),
        slowly(["router=spectral", "router.calibrate=frobenius"]),
        slowly(["router=single", "router.expert=reverse"]),
        ["router=hash", "router.by=example"],
    ],
    ids=lambda words: " ".join(words),
)
def test_routers_from_the_experts_alone_need_no_data(walk, tmp_path, backbone, words):
    mole("build-moe", *SMALL, f"library={walk / 'library'}", *words, f"run.folder={tmp_path / 'run'}")
    assert outside(files(tmp_path / "run"), "mixture") == RUN
    model = open_model(str(tmp_path / "run"), backbone)
    assert model.router_config.name == words[0].partition("=")[2]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    if model.router_config.name in ("arrow", "spectral"):
        assert all(0 < ratio < 1 for ratio in facts["flatness"].values())
    else:
        assert "flatness" not in facts


def test_generation_asks_for_the_task_that_the_router_goes_by(walk, tmp_path, capsys):
    mole("build-moe", *SMALL, f"library={walk / 'library'}", "router=task", f"run.folder={tmp_path / 'run'}")
    words = ["generate", *SMALL, f"model={tmp_path / 'run'}", "prompt=a", "max_new_tokens=2"]
    for given, said in [([], "give task=<one> (known: reverse, shouting)"), (["task=revers"], "did you mean reverse?")]:
        assert main([*words, *given, f"run.folder={tmp_path / 'text'}"]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "text").exists()
    mole(*words, "task=reverse", f"run.folder={tmp_path / 'text'}")


def test_a_task_without_a_row_is_named_before_training(walk, tmp_path, capsys):
    words = ["experts=[reverse]", f"library={walk / 'library'}", "router=poly", f"run.folder={tmp_path / 'run'}"]
    assert main(["build-moe", *SMALL, *data("reverse", "shouting"), *words]) == 2
    said = capsys.readouterr().err
    assert "unknown task 'shouting'" in said
    assert "router.task_names=[reverse,shouting]" in said
    assert "router.unknown" not in said
    assert not (tmp_path / "run").exists()


def test_an_untrained_router_tells_how_it_routes_the_logged_examples(walk, tmp_path):
    words = [*SMALL, *data("reverse", "shouting"), f"library={walk / 'library'}", "router=arrow"]
    mole("build-moe", *words, "log_examples=2", f"run.folder={tmp_path / 'run'}")
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert (told["step"], told["phase"]) == (0, "evaluation")
    assert 0 < told["router/angle"] < 1
    assert set(told["router/load"]) == set(told["router/shouting/load"]) == {"reverse", "shouting"}
    assert "router/p_correct" in told


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["router=phatgoose", "router.gate_steps=3"], {"gates"}),
        slowly(["router=average_activation", "router.max_samples=3"], {"samples"}),
        slowly(["router=spectral", "router.calibrate=zscore"], {"samples"}),
        slowly(["router=hash", "router.balanced=true"], {"tokens", "distinct"}),
        slowly(["router=predictor"], {"texts"}),
        slowly(["router=predictor", "router.head=classifier", "router.classifier_steps=5"], {"texts", "loss", "hits"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_routers_from_data_are_prepared_by_the_same_command(walk, tmp_path, backbone, words, kept):
    given = [*SMALL, *data("reverse", "shouting"), *QUIET, f"library={walk / 'library'}", *words]
    mole("build-moe", *given, f"run.folder={tmp_path / 'run'}")
    assert outside(files(tmp_path / "run"), "mixture", "preparing") == RUN
    assert json.loads((tmp_path / "run" / "run.json").read_text())["prepared"].keys() == kept
    model = open_model(str(tmp_path / "run"), backbone)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, prompt_mask=ids < 4, texts=["shout: now"], task_names=["shouting"]).logits
    assert logits.isfinite().all()


def test_gates_are_trained_once_for_an_expert_of_a_library(walk, tmp_path, backbone):
    shutil.copytree(walk / "library", tmp_path / "library")
    library = open_library(str(tmp_path / "library"))
    library.remove_artefacts(library.artefacts())
    words = [*SMALL, *data("reverse", "shouting"), *QUIET, "router=phatgoose", "router.gate_steps=2"]
    found = []
    for run in ("first", "again", "other"):
        changed = ["router.gate_lr=0.01"] if run == "other" else []
        mole("build-moe", *words, *changed, f"library={tmp_path / 'library'}", f"run.folder={tmp_path / run}")
        gates = json.loads((tmp_path / run / "run.json").read_text())["prepared"]["gates"]
        found.append({name: "after" in facts for name, facts in gates.items()})
    trained, kept = {"reverse": True, "shouting": True}, {"reverse": False, "shouting": False}
    assert found == [trained, kept, trained]
    assert [row.card.kind for row in library.artefacts()] == ["phatgoose"] * 4
    assert "gates of shouting: as they are kept in the library" in (tmp_path / "again" / "log.txt").read_text()
    weights = [(tmp_path / run / "mixture" / "router.safetensors").read_bytes() for run in ("first", "again", "other")]
    assert weights[0] == weights[1] != weights[2]


def test_a_router_made_from_data_needs_some(walk, tmp_path, capsys):
    given = ["build-moe", *SMALL, f"library={walk / 'library'}", "router=phatgoose"]
    assert main([*given, f"run.folder={tmp_path / 'run'}"]) == 2
    assert "dataset: not chosen" in capsys.readouterr().err
    assert main([*given, *data("reverse"), f"run.folder={tmp_path / 'run'}"]) == 2
    assert "there is none for 'shouting'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_predicted_mixture_evaluates_and_generates(walk, tmp_path):
    given = [*SMALL, *data("reverse", "shouting")]
    mole(
        "build-moe", *given, *QUIET, f"library={walk / 'library'}", "router=predictor", f"run.folder={tmp_path / 'run'}"
    )
    for metric in ("loss", "exact_match"):
        words = [*given, f"model={tmp_path / 'run'}", f"metric={metric}", "rows=[oracle,mixture]", "max_new_tokens=3"]
        mole("evaluate", *words, f"run.folder={tmp_path / metric}")
        rows = json.loads((tmp_path / metric / "evaluation.json").read_text())["rows"]
        assert rows["mixture"] == pytest.approx(rows["oracle"])  # the two tasks' prompts begin with other words
    words = [*SMALL, f"model={tmp_path / 'run'}", "prompt=Shout now", "max_new_tokens=3"]
    mole("generate", *words, f"run.folder={tmp_path / 'text'}")


# ---- LoraHub
class Walker:
    """Seeded steps around the weights told as the best so far."""

    def __init__(self, num_experts, bound, seed):
        self.random, self.bound, self.best = random.Random(seed), bound, ((0.0,) * num_experts, float("inf"))

    def ask(self):
        return [max(-self.bound, min(self.bound, w + self.random.gauss(0, 0.5))) for w in self.best[0]]

    def tell(self, weights, objective):
        if objective < self.best[1]:
            self.best = (tuple(weights), objective)


@pytest.fixture
def searching(monkeypatch):
    """A search that needs no extra."""
    made = lambda config, count: Walker(count, config.bound, config.seed)  # noqa: E731
    monkeypatch.setattr(lorahub, "optimizer_for", made)


def probes(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "probes.jsonl").read_text().splitlines()]


def hub(walk, folder, *words):
    given = [*SMALL, *data("reverse"), f"library={walk / 'library'}", "budget=12", "examples=4", "l1=0.01", *words]
    mole("lorahub", *given, f"run.folder={folder}")


def test_lorahub_leaves_its_probes_and_the_best_mixture(walk, tmp_path, backbone, searching):
    hub(walk, tmp_path / "run", "output=both")
    found = files(tmp_path / "run")
    assert outside(found, "mixture", "expert") == {*RUN, "probes.jsonl"}
    rows = probes(tmp_path / "run")
    assert [row["probe"] for row in rows] == list(range(1, 13))
    assert rows[0]["weights"] == {"reverse": 0.0, "shouting": 0.0}
    best = min(rows, key=lambda row: row["objective"])
    assert best["loss"] < rows[0]["loss"]
    result = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    assert result == {"backbone_loss": rows[0]["loss"], **best}
    model = open_model(str(tmp_path / "run" / "mixture"), backbone)
    assert dict(zip(model.expert_names, model.router.mergeable().tolist(), strict=True)) == pytest.approx(
        best["weights"]
    )
    ids = torch.arange(4, 12)[None]
    want = model(input_ids=ids).logits
    model.unload()
    expert = load_expert(tmp_path / "run" / "expert")
    assert expert.card.training["method"] == "lorahub"
    alone = open_model(str(tmp_path / "run" / "expert"), backbone)
    torch.testing.assert_close(alone(input_ids=ids).logits, want, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_lorahub_repeats_and_weighs_factors_apart_where_asked(walk, tmp_path, backbone, searching):
    for name in ("first", "second"):
        hub(walk, tmp_path / name)
    assert probes(tmp_path / "first") == probes(tmp_path / "second")
    hub(walk, tmp_path / "factors", "space=factors")
    delta, factors = probes(tmp_path / "first"), probes(tmp_path / "factors")
    assert delta[0]["loss"] == factors[0]["loss"]
    assert delta[1]["weights"] == factors[1]["weights"]
    assert delta[1]["loss"] != pytest.approx(factors[1]["loss"], rel=1e-6)
    assert open_model(str(tmp_path / "factors"), backbone).router_config.combine == "parameters"


@pytest.mark.slow
def test_the_pool_is_drawn_or_chosen_by_what_each_expert_does_alone(walk, tmp_path, searching):
    hub(walk, tmp_path / "best", "pool=1", "pool_by=loss")
    assert list(probes(tmp_path / "best")[0]["weights"]) == ["reverse"]
    hub(walk, tmp_path / "drawn", "pool=1")
    assert len(probes(tmp_path / "drawn")[0]["weights"]) == 1


def test_lorahub_says_what_is_missing(walk, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    given = ["lorahub", *SMALL, *data("reverse"), f"library={walk / 'library'}", f"run.folder={tmp_path / 'run'}"]
    assert main(given) == 2
    assert "mole-experts[lorahub]" in capsys.readouterr().err
    assert main([*given, "examples=1000"]) == 2
    assert "lower examples" in capsys.readouterr().err
