"""`mole plot weights`, end to end in process: a run folder in, files out."""

import csv
import importlib.util

import pytest
import torch
from walk import files, mole

pytest.importorskip("matplotlib")

from mole.cli.main import main
from mole.routing.log import RoutingLog
from mole.routing.weights_log import WEIGHTS, WeightsLog

SITES = ("bert.layer.0.attention.output", "bert.layer.0.output", "bert.layer.1.output")
LOG = f"scalings/{WEIGHTS}"


def written(run, sets, steps=(0, 1, 2, 3)):
    log = WeightsLog(run / LOG, branches=("rte", "mrpc", "base"), sites=SITES, sets=sets, mode="softmax")
    for step in steps:
        first = 0.25 + step / 8
        rest = (1 - first) / 2
        log.see(step, step / 4, {one: {"rte": first, "mrpc": rest, "base": rest} for one in sets})
    return run


@pytest.fixture
def a_run(tmp_path):
    return written(tmp_path / "run", {"set_00": (0, 1), "set_01": (2,)})


def test_the_mean_is_drawn_into_the_run(a_run, capsys):
    mole("plot", "weights", str(a_run))
    assert files(a_run) == {LOG, "plots/weights.png"}
    assert capsys.readouterr().out.split() == [str(a_run / "plots" / "weights.png")]
    assert (a_run / "plots" / "weights.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_all_of_several_sets_is_the_mean_the_sheet_and_the_map(a_run, tmp_path):
    mole("plot", "weights", f"run={a_run}", "layers=all", "x=epoch", "format=svg", f"to={tmp_path / 'out'}")
    assert files(tmp_path / "out") == {"weights.svg", "weights-sets.svg", "weights-final.svg"}
    assert files(a_run) == {LOG}


def test_all_of_one_set_is_its_one_figure(tmp_path):
    mole("plot", "weights", str(written(tmp_path / "run", {"set_00": (0, 1, 2)})), "layers=all", "format=pdf")
    assert files(tmp_path / "run") == {LOG, "plots/weights.pdf"}


def test_one_site_has_a_figure_of_its_own(a_run):
    mole("plot", "weights", str(a_run), "layers=layer_02")
    assert files(a_run) == {LOG, "plots/weights-layer_02.png"}


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_numbers_come_as_csv(a_run):
    mole("plot", "weights", str(a_run), "layers=all", "format=csv")
    assert files(a_run) == {LOG, "plots/weights.csv"}
    rows = rows_of(a_run / "plots" / "weights.csv")
    assert len(rows) == 4 * 3 * 3
    assert rows[0] == {"step": "0", "epoch": "0.0", "layer": "layer_00", "branch": "rte", "weight": "0.25"}
    mole("plot", "weights", str(a_run), "layers=layer_01", "format=csv")
    assert {row["layer"] for row in rows_of(a_run / "plots" / "weights-layer_01.csv")} == {"layer_01"}
    mole("plot", "weights", str(a_run), "format=csv")
    assert {row["layer"] for row in rows_of(a_run / "plots" / "weights.csv")} == {"mean"}


def test_a_run_that_goes_on_is_drawn_as_far_as_it_is(a_run):
    with (a_run / LOG).open("a") as file:
        file.write('{"step": 4, "epo')
    mole("plot", "weights", str(a_run), "format=csv")
    assert {row["step"] for row in rows_of(a_run / "plots" / "weights.csv")} == {"0", "1", "2", "3"}


def test_html_is_one_page_or_names_the_extra(a_run, capsys):
    if importlib.util.find_spec("plotly") is None:
        assert main(["plot", "weights", str(a_run), "format=html"]) == 2
        assert "mole-experts[plot,plotly]" in capsys.readouterr().err
        assert files(a_run) == {LOG}
        return
    mole("plot", "weights", str(a_run), "layers=all", "format=html")
    assert files(a_run) == {LOG, "plots/weights.html"}


def test_a_run_of_another_router_is_drawn_from_its_routing_log(tmp_path, capsys):
    log = RoutingLog(["l.0", "l.1"], ["sums", "words"])
    for _ in range(3):
        log.record(torch.rand(1, 3, 2, 2).softmax(-1), phase="train")
    log.flush(tmp_path / "scalings" / "log")
    mole("plot", "weights", str(tmp_path), "layers=all", "format=csv", f"to={tmp_path / 'out'}")
    assert {row["branch"] for row in rows_of(tmp_path / "out" / "weights.csv")} == {"sums", "words"}
    mole("plot", "weights", str(tmp_path), "layers=all", f"to={tmp_path / 'pictures'}")
    assert files(tmp_path / "pictures") == {"weights.png", "weights-sets.png", "weights-final.png"}
    assert main(["plot", "weights", str(tmp_path), "x=epoch"]) == 2
    assert "knows no epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("layers=layer_03",), "layers=layer_03: known are mean, all and this run's sites, layer_00 … layer_02"),
        (("x=time",), "x: must be step or epoch"),
        (("format=gif",), "format: must be png, svg, pdf, html or csv"),
        (("plots=[loss]",), "plots"),
    ],
)
def test_what_is_not_known_is_said_and_leaves_nothing(a_run, capsys, words, told):
    assert main(["plot", "weights", str(a_run), *words]) == 2
    assert told in capsys.readouterr().err
    assert files(a_run) == {LOG}


def test_a_run_without_weights_says_what_it_has(tmp_path, capsys):
    assert main(["plot", "weights", str(tmp_path)]) == 2
    assert f"no scalings/{WEIGHTS}" in capsys.readouterr().err
    assert main(["plot", "weights"]) == 2
    assert "run" in capsys.readouterr().err


def test_the_plots_of_a_run_have_its_weights(a_run):
    mole("plot", str(a_run))
    mole("plot", str(a_run), "plots=[weights]", f"to={a_run / 'out'}")
    assert files(a_run) == {LOG, "plots/weights.png", "out/weights.png"}
