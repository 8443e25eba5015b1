"""Weights over training: where they are read from, what the figures say, and that any number of them is drawn."""

import csv
import io
import math
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.text import Text

from mole.analysis import CannotPlot, MissingExtra, get_latest_log, plot_run
from mole.analysis.record import RunRecord
from mole.analysis.weights import history_of, weights_csv
from mole.analysis.weights_figures import (
    MOST_NAMED,
    draw_final_weights,
    draw_weight_sets,
    draw_weights,
    named_branches,
    tints_of,
)
from mole.analysis.weights_html import weights_page
from mole.figure import png
from mole.routing.log import RoutingLog
from mole.routing.weights_log import WEIGHTS, WeightsLog

BRANCHES = ("rte", "mrpc", "base")
SITES = tuple(f"bert.layer.{i}.{kind}" for i in range(2) for kind in ("attention.output", "output"))
SETS = {"set_00": (0, 1, 2), "set_01": (3,)}


def rows_of(branches, sets, steps):
    """Per step: set → branch → weight, a softmax that moves."""
    draw = np.random.default_rng(0)
    slopes = draw.normal(size=(len(sets), len(branches)))
    for step in steps:
        made = np.exp(slopes * step / 10)
        made /= made.sum(1, keepdims=True)
        yield (
            step,
            {one: dict(zip(branches, map(float, row), strict=True)) for one, row in zip(sets, made, strict=True)},
        )


def a_run(folder, branches=BRANCHES, sites=SITES, sets=SETS, steps=(0, 5, 10, 15)):
    log = WeightsLog(folder / "scalings" / WEIGHTS, branches=branches, sites=sites, sets=sets)
    log.start()
    for step, weights in rows_of(branches, sets, steps):
        log.see(step, step / 8, weights)
    return folder


def history(folder, **more):
    return history_of(RunRecord(a_run(folder, **more)))


def write_routing(folder, forwards, experts=("sums", "words"), layers=("l.0", "l.1")):
    log = RoutingLog(layers, experts)
    for weights, facts in forwards:
        log.record(weights, **facts)
    log.flush(folder / "scalings" / "log")
    return folder


def words_in(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def curves(axes):
    return [[list(map(float, axis)) for axis in line.get_data()] for line in axes.lines]


def size(figure):
    return struct.unpack(">II", png(figure)[16:24])


# ---- the log as nlpr's snippet takes it
def test_the_log_is_spread_over_the_sites_in_the_order_in_which_they_run(tmp_path):
    loaded = get_latest_log(a_run(tmp_path))
    expected = dict(rows_of(BRANCHES, SETS, (0, 5, 10, 15)))
    assert [entry["tgs"] for entry in loaded["weights"]] == [
        {"epoch": step / 8, "global_step": step} for step in expected
    ]
    for entry, weights in zip(loaded["weights"], expected.values(), strict=True):
        assert list(entry["weights"]) == ["layer_00", "layer_01", "layer_02", "layer_03"]
        for layer, one in zip(entry["weights"].values(), ("set_00", "set_00", "set_00", "set_01"), strict=True):
            assert layer == pytest.approx(weights[one], rel=1e-8)
    assert (loaded["branches"], loaded["sites"]) == (list(BRANCHES), list(SITES))


def test_nlprs_snippet_draws_a_frame_with_a_column_for_each_branch(tmp_path):
    pandas = pytest.importorskip("pandas")
    loaded = get_latest_log(str(a_run(tmp_path)))
    frame = pandas.DataFrame([d["weights"]["layer_00"] for d in loaded["weights"]])
    assert list(frame.columns) == list(BRANCHES)
    assert frame.shape == (4, 3)
    np.testing.assert_allclose(frame.iloc[0], 1 / 3, rtol=1e-6)


def test_a_run_without_such_a_log_is_refused(tmp_path):
    with pytest.raises(CannotPlot, match=r"no log of learned weights \(scalings/weights\.jsonl\)"):
        get_latest_log(tmp_path)
    with pytest.raises(ValueError, match="no run folder"):
        get_latest_log(tmp_path / "nowhere")


# ---- what is read
def test_the_mean_over_sites_counts_each_site_once(tmp_path):
    found = history(tmp_path)
    first, last = found.values[:, 0], found.values[:, 1]
    np.testing.assert_allclose(found.of(None), (3 * first + last) / 4)
    np.testing.assert_array_equal(found.of(2), first)
    np.testing.assert_array_equal(found.of(3), last)
    np.testing.assert_array_equal(found.final(), np.stack([first[-1]] * 3 + [last[-1]]))


def test_another_routers_weights_come_from_its_logged_training_forwards(tmp_path):
    torch.manual_seed(0)
    forwards = [torch.rand(2, 3, 2, 2).softmax(-1) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    records = [(weights, {"mask": mask, "phase": "train"}) for weights in forwards]
    found = history_of(RunRecord(write_routing(tmp_path, [*records, (forwards[0], {"phase": "eval"})])))
    assert found.values.shape == (3, 2, 2)
    for values, weights in zip(found.values, forwards, strict=True):
        np.testing.assert_allclose(values, weights[mask.bool()].double().mean(0), rtol=1e-6)
    assert found.over("step")[0].tolist() == [1, 2, 3]
    assert found.over("step")[1] == "logged training forward"
    with pytest.raises(CannotPlot, match="knows no epochs"):
        found.over("epoch")
    assert "3 logged training forwards" in " ".join(words_in(draw_weights(found)))


def test_layers_that_share_their_routing_are_one_set(tmp_path):
    weights = torch.rand(1, 2, 1, 2).softmax(-1)
    found = history_of(RunRecord(write_routing(tmp_path, [(weights, {}), (weights, {})])))
    assert found.num_sets == 1
    assert found.of(1).shape == (2, 2)


def test_a_run_that_has_no_course_says_what_it_has(tmp_path):
    with pytest.raises(CannotPlot, match=r"no scalings/weights\.jsonl .*, and no routing log in its place"):
        history_of(RunRecord(tmp_path))
    weights = torch.rand(1, 2, 2, 2).softmax(-1)
    write_routing(tmp_path, [(weights, {"phase": "train"}), (weights, {"phase": "eval"})])
    with pytest.raises(CannotPlot, match=r"1 training forward\(s\) among 2 forwards: .* lower log_every"):
        history_of(RunRecord(tmp_path))


def test_a_log_that_has_no_step_yet_says_so_and_a_damaged_one_is_an_error(tmp_path):
    with pytest.raises(CannotPlot, match="no step yet"):
        history(tmp_path, steps=())
    a_run(tmp_path)
    file = tmp_path / "scalings" / WEIGHTS
    file.write_text(file.read_text().replace('"step": 5', '"step": '))
    with pytest.raises(ValueError, match=r"weights\.jsonl:3"):
        history_of(RunRecord(tmp_path))


# ---- the figures
@pytest.mark.parametrize(("axis", "places"), [("step", [0, 5, 10, 15]), ("epoch", [0, 0.625, 1.25, 1.875])])
def test_lines_run_over_true_steps_or_epochs_and_bars_say_the_last_weights(axis, places, tmp_path):
    found = history(tmp_path)
    figure = draw_weights(found, axis)
    lines, bars = figure.axes
    expected = found.of(None)
    assert curves(lines) == [[places, list(column)] for column in expected.T]
    assert [bar.get_width() for bar in bars.patches] == list(expected[-1])
    assert [label.get_text() for label in bars.get_yticklabels()] == list(BRANCHES)
    assert [to_hex(bar.get_facecolor()) for bar in bars.patches] == [to_hex(line.get_color()) for line in lines.lines]
    found_words = words_in(figure)
    assert {f"{weight:.3f}" for weight in expected[-1]} <= set(found_words)
    assert {"optimizer step" if axis == "step" else "epoch", "weight", "last weight"} <= set(found_words)
    assert any("mean over 4 sites in 2 sets (bands: lowest to highest) · after step 15" in w for w in found_words)


def test_one_site_is_drawn_with_its_own_weights_and_name(tmp_path):
    found = history(tmp_path)
    figure = draw_weights(found, layer=3)
    assert curves(figure.axes[0]) == [[[0, 5, 10, 15], list(column)] for column in found.of(3).T]
    assert any("layer_03: bert.layer.1.output" in word for word in words_in(figure))
    assert not figure.axes[0].collections  # no bands


def test_the_bands_of_a_mean_go_from_the_lowest_set_to_the_highest(tmp_path):
    found = history(tmp_path)
    bands = draw_weights(found).axes[0].collections
    assert len(bands) == len(BRANCHES)
    for branch, band in enumerate(bands):
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(found.values[:, :, branch].min())
        assert heights.max() == pytest.approx(found.values[:, :, branch].max())


def test_the_sheet_has_a_panel_for_each_set_with_the_same_axes(tmp_path):
    sets = {f"set_{i:02d}": (i,) for i in range(4)}
    found = history(tmp_path, sets=sets)
    panels = [axes for axes in draw_weight_sets(found).axes if axes.lines]
    assert len(panels) == 4
    for one, axes in enumerate(panels):
        assert curves(axes) == [[[0, 5, 10, 15], list(column)] for column in found.values[:, one].T]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in panels}) == 1
    assert panels[0].get_ylim()[1] > found.values.max()


def test_a_panel_is_named_by_the_sites_of_its_set(tmp_path):
    sets = {"set_00": (0, 1), "set_01": (2,), "set_02": (3, 5), "set_03": (4,)}
    sites = (*SITES, "bert.layer.2.attention.output", "bert.layer.2.output")
    found = history(tmp_path, sets=sets, sites=sites)
    titles = [found.title_of(one) for one in range(4)]
    assert titles == [
        "layer_00 – layer_01",
        "layer_02 · 1.attention.output",
        "layer_03 … layer_05, 2 sites",
        "layer_04 · 2.attention.output",
    ]
    assert set(titles) <= set(words_in(draw_weight_sets(found)))


def test_the_heat_map_has_the_last_weights_of_every_site(tmp_path):
    found = history(tmp_path)
    figure = draw_final_weights(found)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), 100 * found.final())
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][3] == "1.output · layer_03"
    assert {"share (%)", "branch", "site, under bert.layer"} <= set(words_in(figure))


def test_gates_that_are_no_shares_and_weights_below_zero_are_shown_as_they_are(tmp_path):
    log = WeightsLog(
        tmp_path / "scalings" / WEIGHTS, branches=("a", "b"), sites=("s", "t"), sets={"x": (0,), "y": (1,)}
    )
    log.see(0, 0.0, {"x": {"a": -0.5, "b": 2.0}, "y": {"a": 0.25, "b": 1.0}})
    log.see(1, 0.1, {"x": {"a": -0.5, "b": math.nan}, "y": {"a": 0.25, "b": 1.0}})
    found = history_of(RunRecord(tmp_path))
    assert draw_weights(found, layer=0).axes[0].get_ylim()[0] < -0.5
    assert {"weight", "-0.50"} <= set(words_in(draw_final_weights(found)))
    for figure in (draw_weights(found), draw_weight_sets(found), draw_final_weights(found)):
        assert len(png(figure)) > 1000


@pytest.mark.parametrize(("branches", "sets"), [(2, 1), (3, 5), (25, 2), (90, 3), (3, 60)])
@pytest.mark.parametrize("steps", [(0,), (0, 3)])
def test_any_number_of_branches_and_sets_has_a_legible_size(branches, sets, steps, tmp_path):
    names = [*(f"an-expert-with-a-long-name-{i}" for i in range(branches - 1)), "base"]
    sites = [f"model.layers.{i}.mlp" for i in range(sets)]
    found = history(tmp_path, branches=names, sites=sites, sets={f"set_{i}": (i,) for i in range(sets)}, steps=steps)
    for figure in (draw_weights(found), draw_weight_sets(found)):
        width, height = size(figure)
        assert 300 < width < 4500
        assert 200 < height < 5000
        assert len(png(figure)) > 1000


def test_of_many_branches_those_with_the_largest_weights_have_a_colour_and_a_bar(tmp_path):
    found = history(tmp_path, branches=[f"e{i}" for i in range(60)])
    figure = draw_weights(found)
    last = found.of(None)[-1]
    named = named_branches(last)
    assert len(named) == len(figure.axes[1].patches) == MOST_NAMED
    assert last[named].min() >= np.delete(last, named).max()
    assert len(figure.axes[0].lines) == 60
    assert any("the 20 branches with the least weight in grey" in word for word in words_in(figure))
    assert len(set(tints_of(found, named).values())) == MOST_NAMED


def test_the_same_log_gives_the_same_bytes_and_strange_names_are_text(tmp_path):
    found = history(tmp_path, branches=("$x^2$", "日本語 \U0001f600", "base"))
    for draw in (draw_weights, draw_weight_sets, draw_final_weights):
        assert png(draw(found)) == png(draw(found))
        assert "$x^2$" in words_in(draw(found))


# ---- beside matplotlib
def test_the_numbers_are_rows_of_step_epoch_layer_branch_and_weight(tmp_path):
    found = history(tmp_path)
    rows = list(csv.reader(io.StringIO(weights_csv(found, {"mean": None, "layer_03": 3}))))
    assert rows[0] == ["step", "epoch", "layer", "branch", "weight"]
    assert len(rows) == 1 + 4 * 2 * 3
    by_key = {(int(step), layer, branch): float(weight) for step, _, layer, branch, weight in rows[1:]}
    assert by_key[15, "layer_03", "mrpc"] == found.of(3)[-1, 1]
    assert by_key[5, "mean", "base"] == found.of(None)[1, 2]
    assert {row[1] for row in rows[1:] if row[0] == "10"} == {"1.25"}


def test_forwards_are_not_called_steps_in_the_numbers(tmp_path):
    weights = torch.rand(1, 2, 2, 2).softmax(-1)
    found = history_of(RunRecord(write_routing(tmp_path, [(weights, {}), (weights, {})])))
    rows = list(csv.reader(io.StringIO(weights_csv(found, {"mean": None}))))
    assert rows[0][0] == "forward"
    assert rows[1][:4] == ["1", "", "mean", "sums"]


def test_a_page_of_html_needs_plotly_and_holds_all_it_needs(tmp_path):
    found = history(tmp_path, branches=("rte", "<b>mrpc</b>", "base"))
    try:
        import plotly  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtra, match=r"needs plotly, which is not installed: .*\[plot,plotly\]"):
            weights_page(found)
        return
    page = weights_page(found, every_set=True)
    assert page.count('class="plotly-graph-div"') == 3
    assert weights_page(found).count('class="plotly-graph-div"') == 1
    assert "<script src=" not in page.replace("<script src=\\", "")
    assert weights_page(found) == weights_page(found)


def test_a_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    found = history(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    for draw in (draw_weights, draw_weight_sets, draw_final_weights):
        with pytest.raises(MissingExtra, match=r"mole-experts\[plot\]"):
            draw(found)


# ---- with the other plots
def test_the_plots_of_a_run_have_its_weights_where_it_logged_them(tmp_path):
    files = plot_run(a_run(tmp_path))
    assert list(files) == ["weights"]
    assert files["weights"].read_bytes() == png(draw_weights(history_of(RunRecord(tmp_path))))
    other = tmp_path / "other"
    weights = torch.rand(1, 2, 2, 2).softmax(-1)
    write_routing(other, [(weights, {"phase": "train"})] * 4)
    assert "weights" not in plot_run(other)
