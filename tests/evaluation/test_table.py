"""The table of scores: means, best rows, files."""

import csv
import io
import json
import math

import pytest
from rich.console import Console

from mole.evaluation import Table
from mole.run_folder import RunFolder

ROWS = {
    "base": {"sums": 0.0, "words": 0.1},
    "sums": {"sums": 0.98, "words": 0.0},
    "words": {"sums": 0.02, "words": 0.9},
    "uniform": {"sums": 0.3, "words": 0.4},
    "oracle": {"sums": 0.98, "words": 0.9},
    "mixture": {"sums": 0.97, "words": 0.95},
}


def rendered(table, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table.rendered())
    return console.file.getvalue()


def test_the_best_of_a_column_is_the_highest_or_the_lowest():
    higher, lower = Table("exact_match", ROWS), Table("loss", ROWS)
    assert higher.best("sums") == {"sums", "oracle"}
    assert higher.best("words") == {"mixture"}
    assert higher.best(None) == {"mixture"}
    assert lower.best("sums") == {"base"}
    assert lower.best("words") == {"sums"}
    assert lower.best(None) == {"base"}


def test_the_mean_is_over_all_tasks_and_absent_where_one_is_missing():
    table = Table("exact_match", {"full": {"a": 0.2, "b": 0.4}, "part": {"a": 0.9}})
    assert table.tasks == ("a", "b")
    assert table.mean("full") == pytest.approx(0.3)
    assert table.mean("part") is None
    assert table.best(None) == {"full"}
    assert table.best("a") == {"part"}


def test_a_value_that_is_not_finite_is_never_the_best():
    table = Table("loss", {"x": {"a": math.nan}, "y": {"a": 2.0}, "z": {"a": -math.inf}})
    assert table.best("a") == table.best(None) == {"y"}
    assert json.loads(table.as_json())["rows"] == {"x": {"a": None}, "y": {"a": 2.0}, "z": {"a": None}}


def test_evaluation_json_holds_metric_and_rows_and_nothing_else(tmp_path):
    run = RunFolder(tmp_path)
    Table("exact_match", ROWS).write(run)
    assert json.loads(run.evaluation.read_text()) == {"metric": "exact_match", "rows": ROWS}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "table.csv", "table.md"]
    assert Table.read(run.evaluation) == Table("exact_match", ROWS)


def test_the_csv_has_full_precision_and_the_mean():
    third = 1 / 3
    lines = list(csv.reader(io.StringIO(Table("loss", {"a,b": {"x": third, "y": 1.0}, "c": {"x": 2.0}}).as_csv())))
    assert lines[0] == ["row", "x", "y", "mean"]
    assert lines[1][0] == "a,b"
    assert float(lines[1][1]) == third
    assert float(lines[1][3]) == (third + 1) / 2
    assert lines[2] == ["c", "2.0", "", ""]


def test_markdown_marks_the_best_and_survives_bars_in_names():
    text = Table("exact_match", {"a|b": {"x": 0.5}, "c": {"x": 0.25}}).as_markdown()
    assert "| a\\|b | **0.500** | **0.500** |" in text
    assert "| c | 0.250 | 0.250 |" in text
    assert "higher is better" in text


def test_the_console_shows_every_row_and_marks_the_best_without_colour():
    text = rendered(Table("loss", ROWS))
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert list(lines) == list(ROWS)
    assert lines["base"].count("*") == 2
    assert lines["sums"].count("*") == 1
    assert lines["mixture"].count("*") == 0
    assert "lower is better" in text


def test_names_in_brackets_are_text_not_markup():
    assert "[red]x[/red]" in rendered(Table("loss", {"[red]x[/red]": {"[bold]": 1.0}}))


def test_an_unknown_metric_needs_its_direction():
    with pytest.raises(ValueError, match=r"did you mean exact_match.*higher_is_better"):
        Table("exact_mtch", ROWS)
    assert Table("bleu", ROWS, higher_is_better=True).best("words") == {"mixture"}


def test_a_table_without_values_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        Table("loss", {"base": {}})


@pytest.mark.parametrize("text", ["{", "[]", '{"metric": "loss"}', '{"metric": "loss", "rows": {"a": {"b": "x"}}}'])
def test_a_damaged_evaluation_is_refused_by_name(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json"):
        Table.read(tmp_path / "evaluation.json")
