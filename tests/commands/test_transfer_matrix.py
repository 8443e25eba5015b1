"""Every expert of a library on every dataset: resumable, published to the cards, drawn as a heat map."""

import json
import shutil

import pytest
from walk import SMALL, data, mole

from mole.cli.main import main
from mole.commands import evaluate
from mole.experts import ExpertLibrary


def words(walk, folder):
    return [*SMALL, *data("reverse", "shouting"), f"model={walk / 'library'}", f"run.folder={folder}"]


def test_a_stopped_evaluation_goes_on_with_the_first_score_it_lacks(walk, tmp_path, monkeypatch):
    mole("evaluate", *words(walk, tmp_path / "whole"))
    score, calls = evaluate._score, []

    def counted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("the machine goes down")
        return score(*args)

    monkeypatch.setattr(evaluate, "_score", counted)
    assert main(["evaluate", *words(walk, tmp_path / "run")]) != 0
    assert len(calls) == 4
    assert (tmp_path / "run" / "cells.json").is_file()
    mole("evaluate", "--resume", str(tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    cells = sum(len(row) for row in found["rows"].values())
    assert len(calls) == 4 + cells - 3
    assert found == json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    assert not (tmp_path / "run" / "cells.json").exists()


def test_scores_are_published_to_the_cards_and_replace_those_of_before(walk, tmp_path, capsys):
    library = shutil.copytree(walk / "library", tmp_path / "library")
    for run in ("first", "second"):
        mole("evaluate", *words(tmp_path, tmp_path / run), "publish_scores=true", "rows=[base,experts]")
    assert "2 cards of" in capsys.readouterr().out
    rows = json.loads((tmp_path / "second" / "evaluation.json").read_text())["rows"]
    for name, card in ExpertLibrary.open(str(library)).cards().items():
        found = {row["dataset"]: row for row in card.scores if (row["metric"], row["split"]) == ("loss", "test")}
        assert {dataset: row["value"] for dataset, row in found.items()} == rows[name]
        assert len([row for row in card.scores if row["split"] == "test"]) == 2
        assert not found["reverse"]["higher_is_better"]
        assert len(found["reverse"]["config"]) == 16
        assert found["reverse"]["config"] != found["shouting"]["config"]
    mole("evaluate", *words(tmp_path, tmp_path / "third"), "publish_scores=true", "rows=[experts]", "limit=1")
    card = ExpertLibrary.open(str(library)).card("reverse")
    assert len([row for row in card.scores if row["split"] == "test"]) == 4  # on other samples: beside the first ones


def test_scores_are_published_to_libraries_only(walk, tmp_path, capsys):
    arguments = [*words(walk, tmp_path / "run")[:-2], f"model={walk / 'mixture'}", f"run.folder={tmp_path / 'run'}"]
    assert main(["evaluate", *arguments, "publish_scores=true"]) == 2
    assert "is no library" in capsys.readouterr().err


def test_the_table_is_drawn_as_a_heat_map(walk, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    mole("evaluate", *words(walk, tmp_path / "run"))
    mole("plot", str(tmp_path / "run"))
    assert (tmp_path / "run" / "plots" / "scores.png").stat().st_size > 5000


def new_task(tmp_path):
    """Settings for data of a task that no expert lists."""
    path = tmp_path / "ok.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}: ", "completion": "c"}) + "\n" for i in range(8)))
    return [f"path={path}", "test=0.5", "validation=null"]


def test_the_oracle_has_no_score_for_a_task_without_an_expert(walk, tmp_path):
    settings = [f"datasets.jsonl.{word}" for word in new_task(tmp_path)]
    settings += [f"datasets.reverse.{one}" for one in ("examples=24", "validation_examples=4", "test_examples=4")]
    mole(
        *("evaluate", *SMALL, "dataset=[reverse,jsonl]", *settings),
        *(f"model={walk / 'library'}", f"run.folder={tmp_path / 'run'}"),
    )
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    assert set(rows["oracle"]) == {"reverse"}
    assert all(set(rows[row]) == {"reverse", "jsonl"} for row in rows if row != "oracle")
    assert "–" in (tmp_path / "run" / "table.md").read_text()


def test_a_mixture_that_goes_by_tasks_refuses_others_before_anything_is_computed(walk, tmp_path, capsys):
    mole("build-moe", *SMALL, f"library={walk / 'library'}", "router=task", f"run.folder={tmp_path / 'mixture'}")
    given = [*SMALL, "dataset=jsonl", *(f"dataset.{word}" for word in new_task(tmp_path))]
    given += [f"model={tmp_path / 'mixture'}", f"run.folder={tmp_path / 'run'}"]
    assert main(["evaluate", *given]) == 2
    told = capsys.readouterr().err
    assert "unknown task 'ok'" in told
    assert "rows=[base,experts,uniform]" in told
    assert not (tmp_path / "run").exists()
    mole("evaluate", *given, "rows=[base,experts,uniform]")
