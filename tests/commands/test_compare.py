"""mole compare: several evaluations as one table, best first, and its picture."""

import json

import pytest

from mole.cli.main import main


@pytest.fixture
def evaluations(tmp_path):
    """Two evaluations on the same data, of mixtures called arrow and smear."""
    base, oracle = {"a": 4.0, "b": 5.0}, {"a": 1.0, "b": 1.5}
    for name, mixture in (("arrow", {"a": 2.0, "b": 3.5}), ("smear", {"a": 1.5, "b": 2.0})):
        folder = tmp_path / f"run-{name}"
        folder.mkdir()
        rows = {"base": base, "expert-a": {"a": 1.0, "b": 6.0}, "oracle": oracle, "mixture": mixture}
        (folder / "evaluation.json").write_text(json.dumps({"metric": "loss", "rows": rows}))
        (folder / "config.yaml").write_text(f"name: {name}\n")
    return tmp_path


def compare(root, *words):
    return main(["compare", str(root / "run-arrow"), str(root / "run-smear"), f"to={root / 'out'}", *words])


def test_mixtures_are_rows_under_their_names_best_first(evaluations, capsys):
    assert compare(evaluations) == 0
    rows = json.loads((evaluations / "out" / "evaluation.json").read_text())["rows"]
    assert list(rows) == ["oracle", "smear", "arrow", "base"]
    assert rows["arrow"] == {"a": 2.0, "b": 3.5}
    assert "**1.000**" in (evaluations / "out" / "table.md").read_text()
    assert capsys.readouterr().out.count("smear") >= 1


def test_the_picture_is_a_png(evaluations):
    pytest.importorskip("matplotlib")
    assert compare(evaluations, "experts=true") == 0
    assert (evaluations / "out" / "plots" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "expert-a" in (evaluations / "out" / "table.md").read_text()


def test_other_figures_for_the_same_row_are_refused(evaluations, capsys):
    path = evaluations / "run-smear" / "evaluation.json"
    path.write_text(path.read_text().replace("4.0", "4.5"))
    assert compare(evaluations) != 0
    assert "'base' differs" in capsys.readouterr().err
    assert not (evaluations / "out").exists()


def test_other_metrics_and_missing_evaluations_are_refused(evaluations, capsys):
    path = evaluations / "run-smear" / "evaluation.json"
    path.write_text(path.read_text().replace("loss", "exact_match"))
    assert compare(evaluations) != 0
    assert "different things" in capsys.readouterr().err
    path.unlink()
    assert compare(evaluations) != 0
    assert "evaluation.json" in capsys.readouterr().err
