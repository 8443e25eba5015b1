"""Scores against hand values, degenerate cases, naive loops and, where they are, scikit-learn and scipy."""

import json
import math
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import nn

import mole
from mole.data import IGNORED, Metric, Sample, collate
from mole.data.glue import TASKS, labelled, read_tsv
from mole.evaluation import HIGHER_IS_BETTER, METRICS, Validation, mean_loss, predict, scores, write_predictions
from mole.evaluation.classification import accuracy, f1, macro_f1, mcc, pearson, ranks, spearman
from mole.head import Head
from mole.run_folder import RunFolder

DATA = Path(os.environ.get("MOLE_TEST_DATA") or Path(mole.__file__).parents[2] / "shared" / "data") / "glue"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no GLUE files in {DATA}; MOLE_TEST_DATA can name their parent")
BINARY, THREE = Head("classification", ("no", "yes")), Head("classification", ("a", "b", "c"))
NUMBER = Head("regression")


def ints(*values):
    return torch.tensor(values)


def floats(*values):
    return torch.tensor(values, dtype=torch.float64)


def logits_of(predicted, size):
    return nn.functional.one_hot(predicted, size).float()


# ---- hand values
PREDICTED, TARGETS = ints(1, 1, 1, 0, 0, 0, 1, 0, 0, 0), ints(1, 1, 0, 0, 0, 1, 1, 1, 0, 0)  # 3 hits, 1 false, 2 missed


def test_scores_of_two_labels_have_their_hand_values():
    assert accuracy(PREDICTED, TARGETS) == 0.7
    assert f1(PREDICTED, TARGETS) == pytest.approx(6 / 9, abs=1e-15)
    assert f1(PREDICTED, TARGETS, positive=0) == pytest.approx(8 / 11, abs=1e-15)
    assert macro_f1(PREDICTED, TARGETS, 2) == pytest.approx((6 / 9 + 8 / 11) / 2, abs=1e-15)
    assert mcc(PREDICTED, TARGETS) == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6), abs=1e-15)


def test_correlations_have_their_hand_values():
    x, y = floats(1, 2, 3, 4), floats(1, 3, 2, 5)
    assert pearson(x, y) == pytest.approx(5.5 / math.sqrt(5 * 8.75), abs=1e-15)
    assert spearman(x, y) == pytest.approx(0.8, abs=1e-15)
    assert pearson(x, -2 * x + 1) == -1.0
    assert spearman(x, x.exp()) == 1.0 > pearson(x, x.exp())


def test_equal_numbers_share_the_mean_of_their_ranks():
    assert ranks(floats(3, 1, 3, 2, 3)).tolist() == [4, 1, 4, 2, 4]
    assert ranks(floats(5, 5)).tolist() == [1.5, 1.5]
    assert spearman(floats(1, 2, 2, 3), floats(1, 2, 3, 4)) == pytest.approx(4.5 / math.sqrt(4.5 * 5), abs=1e-15)


# ---- degenerate cases: 0, never NaN
def test_what_is_undefined_is_nought():
    one, both = ints(1, 1, 1, 1), ints(0, 1, 0, 1)
    assert f1(ints(0, 0), ints(0, 0)) == 0.0
    assert f1(ints(0, 0), ints(1, 0)) == 0.0
    assert mcc(one, both) == mcc(both, one) == mcc(one, one) == 0.0
    assert mcc(ints(0, 0, 0, 0), both) == 0.0
    tenth = torch.full((7,), 0.1)
    varied = torch.arange(7.0)
    for correlation in (pearson, spearman):
        assert correlation(tenth, varied) == correlation(varied, tenth) == correlation(tenth, tenth) == 0.0
        assert correlation(floats(1.0), floats(2.0)) == 0.0


def test_a_label_that_is_nowhere_does_not_count_in_the_mean():
    assert macro_f1(ints(0, 1), ints(0, 1), 3) == 1.0
    assert macro_f1(ints(0, 2), ints(0, 1), 3) == pytest.approx(1 / 3)


def test_tiny_and_huge_numbers_still_correlate():
    x = torch.arange(5.0, dtype=torch.float64)
    assert pearson(x * 1e-200, x) == pytest.approx(1.0)
    assert pearson(x * 1e200, x) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_matthews_correlation_of_two_labels_is_pearsons(seed):
    draw = torch.Generator().manual_seed(seed)
    said, there = (torch.randint(0, 2, (50,), generator=draw) for _ in range(2))
    assert mcc(said, there) == pytest.approx(pearson(said, there), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_matthews_correlation_of_several_labels_is_that_of_their_indicators(seed):
    draw = torch.Generator().manual_seed(seed)
    said, there = (torch.randint(0, 4, (60,), generator=draw) for _ in range(2))

    def covariance(a, b):
        x, y = (nn.functional.one_hot(row, 4).double() for row in (a, b))
        return float(((x - x.mean(0)) * (y - y.mean(0))).sum())

    expected = covariance(said, there) / math.sqrt(covariance(said, said) * covariance(there, there))
    assert mcc(said, there) == pytest.approx(expected, abs=1e-12)


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(0)
    for size in (2, 5):
        said, there = (torch.randint(0, size, (200,), generator=draw) for _ in range(2))
        assert accuracy(said, there) == pytest.approx(metrics.accuracy_score(there, said))
        assert mcc(said, there) == pytest.approx(metrics.matthews_corrcoef(there, said))
        assert macro_f1(said, there, size) == pytest.approx(metrics.f1_score(there, said, average="macro"))
    assert f1(said.clamp(max=1), there.clamp(max=1)) == pytest.approx(
        metrics.f1_score(there.clamp(max=1), said.clamp(max=1))
    )


def test_correlations_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 9, (200,), generator=draw).double() for _ in range(2))
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


# ---- main scores
def test_every_metric_that_data_can_name_is_there_and_higher_is_better():
    assert set(METRICS) == set(get_args(Metric))
    assert all(task.metric in METRICS for task in TASKS.values())
    named = {part for metric in METRICS for part in (metric, *example(metric))}
    assert all(HIGHER_IS_BETTER[name] for name in named)


def example(metric):
    if metric == "pearson_spearman":
        return scores(metric, NUMBER, floats(1, 2, 3, 4)[:, None], floats(1, 3, 2, 5))
    return scores(metric, BINARY, logits_of(PREDICTED, 2), TARGETS)


def test_the_main_score_is_the_mean_of_its_parts():
    assert example("accuracy") == {"accuracy": 0.7, "score": 0.7}
    assert example("mcc") == {"mcc": mcc(PREDICTED, TARGETS), "score": mcc(PREDICTED, TARGETS)}
    assert example("accuracy_f1") == pytest.approx({"accuracy": 0.7, "f1": 6 / 9, "score": (0.7 + 6 / 9) / 2})
    macro = (6 / 9 + 8 / 11) / 2
    assert example("accuracy_macro_f1") == pytest.approx(
        {"accuracy": 0.7, "macro_f1": macro, "score": (0.7 + macro) / 2}
    )
    r = 5.5 / math.sqrt(5 * 8.75)
    assert example("pearson_spearman") == pytest.approx({"pearson": r, "spearman": 0.8, "score": (r + 0.8) / 2})


def test_what_does_not_fit_the_head_is_refused():
    rows = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="unknown metric 'acuracy'; did you mean accuracy"):
        scores("acuracy", THREE, rows, [0, 1])
    with pytest.raises(ValueError, match="accuracy_f1 is for two labels, and there are 3"):
        scores("accuracy_f1", THREE, rows, [0, 1])
    with pytest.raises(ValueError, match="pearson_spearman does not go with a head for classification"):
        scores("pearson_spearman", THREE, rows, [0, 1])
    with pytest.raises(ValueError, match="mcc does not go with a head for regression"):
        scores("mcc", NUMBER, rows[:, :1], [0.0, 1.0])
    with pytest.raises(ValueError, match=r"logits \[2, 3\] for 3 texts"):
        scores("accuracy", THREE, rows, [0, 1, 2])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_model_that_broke_has_no_score(broken):
    logits = logits_of(PREDICTED, 2)
    logits[3, 0] = broken
    assert all(math.isnan(value) for value in scores("accuracy_f1", BINARY, logits, TARGETS).values())


@real
def test_predicting_the_majority_scores_as_published():
    def majority(name, folder, predicted):
        task = TASKS[name]
        rows, _ = labelled(read_tsv(str(DATA / folder / "dev.tsv"), task.header), task)
        there = [row.target for row in rows]
        return scores(task.metric, task.head, logits_of(torch.full((len(there),), predicted), 2), there)

    mrpc = majority("mrpc", "MRPC", 1)
    assert (round(mrpc["accuracy"], 4), round(mrpc["f1"], 4)) == (0.6838, 0.8122)
    assert round(majority("rte", "RTE", 0)["score"], 4) == 0.5271
    assert majority("cola", "CoLA", 1)["score"] == 0.0


# ---- predictions
class Texts(nn.Module):
    """A head over the mean of table rows: what a text gets depends on its own tokens alone."""

    def __init__(self, outputs, names=None):
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, outputs, generator=torch.Generator().manual_seed(0)))
        self.dropout = nn.Dropout(0.5)
        self.seen = []

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        self.seen.append(list(input_ids.shape))
        mask = attention_mask[..., None]
        return SimpleNamespace(logits=(self.dropout(self.table[input_ids]) * mask).sum(1) / mask.sum(1))


def text(ids, target, task="a"):
    return Sample(tuple(ids), (IGNORED,) * len(ids), task, "", "", tuple(ids), target, (), f"dev.tsv:{len(ids)}")


SAMPLES = [text([1, 5], 1), text([1, 7, 3, 9, 2], 0), text([4], 1, "b"), text([1, 8, 3], 0, "b"), text([2, 2, 6, 1], 1)]
padded = partial(collate, pad_token_id=0)


def by_hand(model, samples):
    return torch.stack([model.table[list(sample.input_ids)].mean(0) for sample in samples]).detach()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_logits_come_in_the_samples_order_without_dropout(batch_size):
    model = Texts(3).train()
    found = predict(model, SAMPLES, padded, batch_size=batch_size)
    assert torch.allclose(found, by_hand(model, SAMPLES), atol=1e-6)
    assert model.seen[0][1] == 5  # the longest first
    assert model.training
    assert not found.requires_grad


def test_half_precision_logits_come_in_float32():
    found = predict(Texts(2).bfloat16(), SAMPLES, padded, batch_size=2)
    assert found.dtype == torch.float32


def test_a_model_without_a_head_is_refused():
    class Words(Texts):
        def forward(self, input_ids):
            return SimpleNamespace(logits=self.table[input_ids])

    with pytest.raises(ValueError, match="no head for whole texts"):
        predict(Words(2), SAMPLES, padded, batch_size=2)
    with pytest.raises(ValueError, match="no samples"):
        predict(Texts(2), [], padded, batch_size=2)
    with pytest.raises(ValueError, match="batch_size"):
        predict(Texts(2), SAMPLES, padded, batch_size=0)


def test_the_loss_of_a_label_is_the_mean_cross_entropy_per_text():
    model = Texts(2)
    losses = -by_hand(model, SAMPLES).double().log_softmax(-1)[range(5), [sample.target for sample in SAMPLES]]
    found = mean_loss(model, SAMPLES, padded, batch_size=2)
    assert [(task, loss.tokens) for task, loss in found.items()] == [("a", 3), ("b", 2)]
    assert found["a"].loss == pytest.approx(float(losses[[0, 1, 4]].mean()), rel=1e-6)
    assert found["b"].loss == pytest.approx(float(losses[[2, 3]].mean()), rel=1e-6)


def test_the_loss_of_a_number_is_the_mean_squared_error():
    model, rows = Texts(1), [text([1, 5], 2.5), text([7], -1.0)]
    errors = [float(by_hand(model, [row])) - row.target for row in rows]
    found = mean_loss(model, rows, padded, batch_size=2)["a"]
    assert found.loss == pytest.approx(sum(error**2 for error in errors) / 2, rel=1e-6)


def test_a_validation_has_loss_parts_and_score():
    model = Texts(2)
    found = Validation(model, SAMPLES, padded, 2, head=BINARY, metric="accuracy_f1")(3)
    logits, targets = by_hand(model, SAMPLES), [sample.target for sample in SAMPLES]
    expected = scores("accuracy_f1", BINARY, logits, targets)
    losses = mean_loss(model, SAMPLES, padded, batch_size=2)
    assert found["validation_loss"] == pytest.approx((3 * losses["a"].loss + 2 * losses["b"].loss) / 5)
    assert {name: found[f"validation_{name}"] for name in ("accuracy", "f1", "score")} == expected
    assert found["validation_loss/b"] == losses["b"].loss
    b = scores("accuracy_f1", BINARY, logits[2:4], targets[2:4])["score"]
    assert found["validation_score/b"] == b != found["validation_score"]
    assert len(found) == 4 + 2 * 2


def test_a_validation_of_one_task_names_no_task_and_takes_the_heads_metric():
    found = Validation(Texts(2), [SAMPLES[0], SAMPLES[1]], padded, 2, head=BINARY)(0)
    assert set(found) == {"validation_loss", "validation_accuracy", "validation_score"}
    rows = [text([1, 5], 2.5), text([7], -1.0), text([7, 3], 0.0)]
    found = Validation(Texts(1), rows, padded, 2, head=NUMBER)(0)
    assert set(found) == {"validation_loss", "validation_pearson", "validation_spearman", "validation_score"}


def test_a_limit_looks_at_the_first_samples():
    model = Texts(2)
    limited = Validation(model, SAMPLES, padded, 100, head=BINARY, limit=2)
    assert limited.samples == SAMPLES[:2]
    assert limited(0) == Validation(model, SAMPLES[:2], padded, 100, head=BINARY)(0)
    assert model.seen[0][0] == 2


def test_a_validation_needs_a_head_for_targets_and_targets_for_a_head():
    tokens = [Sample((1, 5), (IGNORED, 5), "t", "", "", (1,))]
    for samples, head in ((SAMPLES, None), (tokens, BINARY)):
        with pytest.raises(ValueError, match="give both or neither"):
            Validation(Texts(2), samples, padded, 2, head=head)


# ---- the file
def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_are_kept_with_row_logits_and_names(tmp_path):
    path = RunFolder(tmp_path).predictions
    write_predictions(path, SAMPLES[:2], torch.tensor([[0.5, 0.1], [-1.0, 2.0]]), BINARY)
    assert path.name == "predictions.jsonl"
    assert lines(path) == [
        {"row": "dev.tsv:2", "logits": [0.5, pytest.approx(0.1)], "prediction": "no", "label": "yes"},
        {"row": "dev.tsv:5", "logits": [-1.0, 2.0], "prediction": "yes", "label": "no"},
    ]
    assert torch.tensor([line["logits"] for line in lines(path)]).equal(torch.tensor([[0.5, 0.1], [-1.0, 2.0]]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_predicted_numbers_are_numbers_and_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "x.jsonl"
    write_predictions(path, [text([1, 5], 2.5), text([7], -1.0)], torch.tensor([[0.5], [math.nan]]), NUMBER)
    assert [(line["prediction"], line["label"]) for line in lines(path)] == [(0.5, 2.5), (None, -1.0)]
    write_predictions(path, SAMPLES[:1], torch.tensor([[math.nan, 1.0]]), BINARY)
    assert lines(path) == [{"row": "dev.tsv:2", "logits": [None, 1.0], "prediction": None, "label": "yes"}]


def test_a_new_start_of_a_run_takes_old_predictions_away(tmp_path):
    run = RunFolder(tmp_path)
    write_predictions(run.predictions, SAMPLES[:1], torch.tensor([[0.5, 0.1]]), BINARY)
    run.clear()
    assert not run.predictions.exists()
