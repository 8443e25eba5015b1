"""Plots from logs alone: what they say, what they refuse, and that they are the same each time."""

import json
import math
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.text import Text

from mole.analysis import CannotPlot, MissingExtra, TokensView, plot_run
from mole.analysis.layers import draw_layers
from mole.analysis.library_map import draw_map
from mole.analysis.loss import draw_loss
from mole.analysis.record import RunRecord
from mole.analysis.shares import are_shares, mean_by_layer, mean_by_task, telling
from mole.analysis.tasks import draw_tasks
from mole.analysis.tokens import draw_tokens, visible
from mole.figure import colours, png, shortened, without_common_start
from mole.routing.log import RoutingLog, load_routing_log

EXPERTS = ("sums", "words")
LAYERS = tuple(f"model.layers.{i}.{kind}" for i in range(2) for kind in ("q_proj", "v_proj"))


def shares(batch, length, layers=4, experts=2, seed=0):
    return torch.rand(batch, length, layers, experts, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def write_log(folder, records, experts=EXPERTS, layers=LAYERS, decode=lambda ids: [f"w{i}" for i in ids]):
    log = RoutingLog(layers, experts)
    for scalings, facts in records:
        log.record(scalings, **facts)
    log.flush(folder / "scalings" / "log", decode=decode)


def write_metrics(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def a_run(folder):
    ids = torch.arange(8).reshape(2, 4)
    write_log(
        folder,
        [
            (shares(2, 4), {"token_ids": ids, "task_names": ["words", "sums"], "phase": "train"}),
            (shares(2, 4, seed=1), {"token_ids": ids, "task_names": ["words", "sums"], "phase": "eval"}),
            (shares(1, 3, seed=2), {"token_ids": torch.tensor([[1, 2, 3]]), "phase": "prefill"}),
            (shares(1, 1, seed=3), {"token_ids": torch.tensor([[4]]), "phase": "decode"}),
        ],
    )
    write_metrics(
        folder,
        {"step": 0, "phase": "evaluation", "validation_loss": 3.0, "exact_match/sums": 0.0, "seconds": 0},
        {"step": 1, "phase": "train", "loss": 2.5, "learning_rate": 0.1},
        {"step": 2, "phase": "train", "loss": 2.0, "learning_rate": 0.1},
        {"step": 2, "phase": "evaluation", "validation_loss": 1.75, "exact_match/sums": 0.5, "seconds": 1},
    )
    return folder


def words_in(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


# ---- means
def test_means_are_over_valid_tokens_only(tmp_path):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    weights = shares(2, 3)
    write_log(tmp_path, [(weights, {"mask": mask, "task_names": ["a", "b"], "phase": "eval"})])
    entries = load_routing_log(tmp_path / "scalings").entries
    valid = torch.cat([weights[0], weights[1, :1]]).double()
    mean = mean_by_layer(entries)
    np.testing.assert_allclose(mean.values, valid.mean(0), rtol=1e-6)
    assert (mean.tokens, mean.is_share) == (4, True)
    by_task = mean_by_task(entries)
    np.testing.assert_allclose(by_task["a"].values, weights[0].double().mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(by_task["b"].values, weights[1, :1].double().mean((0, 1)), rtol=1e-6)


def test_evaluation_tells_most_then_generation_then_the_end_of_training(tmp_path):
    def chosen(*phases):
        folder = tmp_path / "-".join(phases)
        write_log(folder, [(shares(1, 2), {"phase": phase}) for phase in phases])
        entries, words = telling(load_routing_log(folder / "scalings"))
        return [entry.phase for entry in entries], words

    assert chosen("train", "prefill", "decode", "eval") == (["eval"], "evaluation")
    assert chosen("train", "prefill", "decode") == (["prefill", "decode"], "generation")
    assert chosen(*["train"] * 8) == (["train"] * 2, "last 2 of 8 logged training forwards")


def test_weights_are_shares_only_if_they_are_positive_and_sum_to_one():
    assert are_shares(np.array([[0.2, 0.8], [1.0, 0.0]]))
    assert not are_shares(np.array([[0.2, 0.7]]))
    assert not are_shares(np.array([[-0.2, 1.2]]))


# ---- each plot
def test_the_layers_plot_shows_the_share_of_each_expert_in_each_layer(tmp_path):
    weights = torch.zeros(1, 4, len(LAYERS), 2)
    weights[..., 0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    weights[..., 1] = 1 - weights[..., 0]
    write_log(tmp_path, [(weights, {"phase": "eval"})])
    found = words_in(draw_layers(RunRecord(tmp_path)))
    for word in ("10", "90", "40", "60", "0.q_proj", "1.v_proj", "layer, under model.layers", "sums", "share (%)"):
        assert word in found
    assert f"{tmp_path.name} · 4 tokens, evaluation" in found


def test_layers_that_share_their_routing_are_one_row(tmp_path):
    write_log(tmp_path, [(shares(1, 4, layers=1), {"phase": "eval"})])
    assert "all 4 layers" in words_in(draw_layers(RunRecord(tmp_path)))


def test_weights_that_are_no_shares_are_shown_as_they_are(tmp_path):
    write_log(tmp_path, [(torch.tensor([-0.5, 2.0]).expand(1, 4, 4, 2), {"phase": "eval", "task_names": ["a"]})])
    for draw in (draw_layers, draw_tasks):
        found = words_in(draw(RunRecord(tmp_path)))
        assert {"mean weight", "-0.50", "2.00"} <= set(found)


def test_the_tasks_plot_puts_tasks_in_the_order_of_their_experts(tmp_path):
    figure = draw_tasks(RunRecord(a_run(tmp_path)))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["sums", "words"]
    means = mean_by_task(load_routing_log(tmp_path / "scalings").entries[1:2])
    assert f"{100 * means['sums'].values[0]:.0f}" in words_in(figure)


def test_the_loss_plot_names_training_validation_its_best_and_other_metrics(tmp_path):
    figure = draw_loss(RunRecord(a_run(tmp_path)))
    found = words_in(figure)
    for word in ("training", "validation", "best: 1.750\nat step 2", "exact match", "sums", "loss (nats per token)"):
        assert word in found
    train = next(line for line in figure.axes[0].lines if line.get_label() == "training")
    assert [list(axis) for axis in train.get_data()] == [[1, 2], [2.5, 2.0]]
    assert len(figure.axes) == 2


def test_a_loss_that_was_not_finite_leaves_a_gap(tmp_path):
    write_metrics(tmp_path, *({"step": i, "phase": "train", "loss": None if i == 2 else 1.0 / i} for i in range(1, 5)))
    (line,) = draw_loss(RunRecord(tmp_path)).axes[0].lines
    assert list(line.get_xdata()) == [1, 3, 4]


def test_a_half_written_last_line_of_metrics_is_left_out_and_another_is_refused(tmp_path):
    lines = [json.dumps({"step": 1, "phase": "train", "loss": 1.0}), '{"step": 2, "pha']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert len(RunRecord(tmp_path).metrics) == 1
    (tmp_path / "metrics.jsonl").write_text("\n".join(reversed(lines)))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1"):
        _ = RunRecord(tmp_path).metrics


def test_the_tokens_plot_shows_a_whole_generated_text_with_its_experts(tmp_path):
    found = words_in(draw_tokens(RunRecord(a_run(tmp_path)), TokensView()))
    for word in ("w1", "w2", "w3", "w4"):
        assert word in found
    assert any("text 2, row 0 (generation, 4 tokens)" in word and "black: generated" in word for word in found)
    assert sum(word.startswith(("sums  ", "words  ")) for word in found) == 2


def test_entry_row_and_layer_choose_what_the_tokens_plot_shows(tmp_path):
    figure = draw_tokens(RunRecord(a_run(tmp_path)), TokensView(entry=0, row=1, layer=3))
    found = words_in(figure)
    assert "w7" in found
    assert "w3" not in found
    assert any("task sums · layer model.layers.1.v_proj" in word for word in found)
    weights = shares(2, 4)[1, :, 3]
    bars = [patch for patch in figure.axes[0].patches if patch.get_facecolor()[:3] == colours(2)[0]]
    heights = [abs(bar.get_height()) / 0.42 for bar in bars]
    np.testing.assert_allclose(heights, weights[:, 0], rtol=1e-5)
    above = [patch for patch in figure.axes[0].patches if patch.get_facecolor()[:3] == colours(2)[1]]
    tops = [bar.get_y() + bar.get_height() for bar in bars]
    np.testing.assert_allclose([bar.get_y() for bar in above], tops, rtol=1e-6)


def test_padding_is_no_token_of_the_strip(tmp_path):
    write_log(
        tmp_path,
        [(shares(1, 3), {"token_ids": torch.tensor([[5, 6, 7]]), "mask": torch.tensor([[0, 1, 1]]), "phase": "eval"})],
    )
    found = words_in(draw_tokens(RunRecord(tmp_path), TokensView()))
    assert {"w6", "w7"} <= set(found)
    assert "w5" not in found
    assert any("2 tokens" in word for word in found)


def test_token_ids_stand_in_for_texts_that_nothing_could_decode(tmp_path):
    write_log(tmp_path, [(shares(1, 2), {"token_ids": torch.tensor([[501, 502]]), "phase": "eval"})], decode=None)
    assert {"501", "502"} <= set(words_in(draw_tokens(RunRecord(tmp_path), TokensView())))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (TokensView(entry=9), r"entry=9: .* 3 texts, 0 … 2"),
        (TokensView(entry=0, row=2), r"row=2: text 0 has 2 rows"),
        (TokensView(layer=4), r"layer=4: .* 4 layers"),
    ],
)
def test_a_text_row_or_layer_that_is_not_there_is_refused(tmp_path, view, message):
    with pytest.raises(ValueError, match=message):
        draw_tokens(RunRecord(a_run(tmp_path)), view)


def test_many_experts_are_rows_and_a_long_text_is_cut_and_says_so(tmp_path):
    experts = [f"an-organisation/an-expert-with-quite-a-long-name-{i}" for i in range(12)]
    ids = torch.arange(900)[None]
    weights = shares(1, 900, layers=1, experts=12)
    write_log(tmp_path, [(weights, {"token_ids": ids, "phase": "eval"})], experts=experts)
    figure = draw_tokens(RunRecord(tmp_path), TokensView())
    found = words_in(figure)
    assert any("of 900 tokens" in word for word in found)
    assert shortened(experts[0], 28) in found
    assert figure.get_size_inches()[1] < 40


# ---- all of them
def test_every_plot_is_written_and_is_the_same_the_next_time(tmp_path):
    files = plot_run(a_run(tmp_path / "run" if (tmp_path / "run").mkdir() is None else tmp_path))
    assert list(files) == ["loss", "layers", "tasks", "tokens"]
    assert sorted(path.name for path in (tmp_path / "run" / "plots").iterdir()) == [
        "layers.png", "loss.png", "tasks.png", "tokens.png",
    ]  # fmt: skip
    again = plot_run(tmp_path / "run", to=tmp_path / "again")
    for name, path in files.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(size(path)) > 200
        assert b"matplotlib" not in path.read_bytes()[:400].lower()


def test_only_what_the_logs_allow_is_drawn_unless_asked_for(tmp_path):
    write_log(tmp_path, [(shares(1, 2), {"phase": "eval"})])
    assert list(plot_run(tmp_path)) == ["layers"]
    with pytest.raises(CannotPlot) as error:
        plot_run(tmp_path, ["layers", "loss", "tasks", "tokens"], to=tmp_path / "new")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("3 plot(s)")
    assert [line.split(":")[0] for line in lines[1:]] == ["loss", "tasks", "tokens"]
    assert not (tmp_path / "new").exists()


def test_a_run_without_logs_an_unknown_plot_and_no_run_are_refused(tmp_path):
    with pytest.raises(CannotPlot, match=r"metrics\.jsonl"):
        plot_run(tmp_path)
    with pytest.raises(ValueError, match="did you mean layers"):
        plot_run(tmp_path, ["layer"])
    with pytest.raises(ValueError, match="no plot was asked for"):
        plot_run(tmp_path, [])
    with pytest.raises(ValueError, match="no run folder"):
        plot_run(tmp_path / "nowhere")


def test_a_damaged_log_is_an_error_also_when_nothing_was_asked_for(tmp_path):
    a_run(tmp_path)
    (tmp_path / "scalings" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json"):
        plot_run(tmp_path)
    assert not (tmp_path / "plots").exists()


def test_a_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"mole-experts\[plot\]"):
        plot_run(a_run(tmp_path))


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    import sys

    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_run(a_run(tmp_path))
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (60, 30), (224, 5)])
def test_heat_maps_have_a_legible_size_from_one_layer_to_hundreds(tmp_path, layers, experts):
    names = [f"expert-{i}" for i in range(experts)]
    paths = [f"model.layers.{i}.mlp" for i in range(layers)]
    weights = shares(experts, 2, layers=layers, experts=experts)
    write_log(tmp_path, [(weights, {"phase": "eval", "task_names": names})], experts=names, layers=paths)
    for path in plot_run(tmp_path, ["layers", "tasks"]).values():
        width, height = size(path)
        assert 300 < width < 4000
        assert 200 < height < 5000


def test_names_with_dollars_markup_and_strange_letters_are_drawn_as_text(tmp_path):
    experts = ("$x^2$", "$\\frac{1$", "日本語 \U0001f600")
    ids = torch.tensor([[1, 2, 3, 4]])
    texts = {1: "\n", 2: "$5", 3: "日", 4: "\x00 \ud800"}
    write_log(
        tmp_path,
        [(shares(1, 4, experts=3), {"token_ids": ids, "task_names": ["$"], "phase": "eval"})],
        experts=experts,
        decode=lambda row: [texts[i] for i in row],
    )
    assert list(plot_run(tmp_path)) == ["layers", "tasks", "tokens"]  # and no warning of a missing glyph
    figure = draw_tokens(RunRecord(tmp_path), TokensView())
    png(figure)
    found = words_in(figure)
    assert {"↵", "$5"} <= set(found)
    assert any(word.startswith("$x^2$") for word in found)


def test_control_characters_and_spaces_of_a_token_are_visible():
    assert visible(" the") == "·the"
    assert visible("\n\t") == "↵→"
    assert visible("\x07") == "\\u0007"
    assert visible("") == "∅"


def test_the_common_start_of_layer_names_is_split_off():
    assert without_common_start(["a.b.0.q", "a.b.1.q"]) == ("a.b", ["0.q", "1.q"])
    assert without_common_start(["a.b.q"]) == ("", ["a.b.q"])
    assert without_common_start(["a", "a.b"]) == ("", ["a", "a.b"])


def test_thirty_experts_have_thirty_colours():
    for count in (1, 10, 20, 30):
        assert len(set(colours(count))) == count
    assert all(math.isfinite(x) and 0 <= x <= 1 for colour in colours(30) for x in colour)


def test_every_name_of_a_library_map_is_inside_its_frame():
    names = ["a-rather-long-name-of-an-expert", "b", "another-long-name-of-an-expert"]
    figure = draw_map("lib", [(0.5, 0.1), (0.0, -0.2), (-0.5, 0.1)], names, [0, 0, 0])
    png(figure)
    frame = figure.axes[0].bbox
    for text in figure.axes[0].texts[-3:]:
        assert frame.x0 <= text.get_window_extent().x0 <= text.get_window_extent().x1 <= frame.x1
    assert any("in 1 cluster, by" in text.get_text() for text in figure.findobj(Text))
