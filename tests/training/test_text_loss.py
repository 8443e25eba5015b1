"""The loss of whole texts: per example, however a step is cut up; and which metric chooses the weights by itself."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training_toy import fit_toy, lines, recipe

from mole.training import TrainingConfig, TrainingData, make_accelerator
from mole.training.batches import SampleStream, plan_layout
from mole.training.learner import build_learner
from mole.training.loss import supervised_tokens, text_loss, valid_tokens
from mole.training.optimizers import AdamWConfig
from mole.training.selection import Selection, criterion
from mole.training.step import take_census, take_step


class ToyTexts(nn.Module):
    """A head over the mean of a frozen embedding and a trained map."""

    def __init__(self, outputs=3, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(13, 8, generator=draw, dtype=torch.float64), requires_grad=False)
        self.mix = nn.Parameter(torch.randn(8, 8, generator=draw, dtype=torch.float64) * 0.5)
        self.out = nn.Parameter(torch.randn(outputs, 8, generator=draw, dtype=torch.float64) * 0.5)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].double()
        pooled = (torch.tanh(self.embedding[input_ids] @ self.mix) * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=pooled @ self.out.T)


def rows(count, outputs=3, seed=0):
    """(ids, label) of uneven length; of one output, labels are numbers."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        ids = [draw.randrange(13) for _ in range(draw.randint(1, 9))]
        found.append((ids, sum(ids) % outputs if outputs > 1 else sum(ids) / 10))
    return found


def collate(chosen):
    width = max(len(ids) for ids, _ in chosen)
    is_regression = isinstance(chosen[0][1], float)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in chosen]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in chosen]),
        "labels": torch.tensor([y for _, y in chosen], dtype=torch.float32 if is_regression else torch.long),
        "task_names": ["toy"] * len(chosen),
    }


def test_the_loss_is_the_naive_sum_over_texts():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, -100, 1, 2])
    naive = sum(-float(torch.log_softmax(logits[b], -1)[labels[b]]) for b in (0, 1, 3, 4))
    assert abs(float(text_loss(logits, labels)) - naive) < 1e-12
    assert supervised_tokens(labels) == 4


def test_the_loss_of_numbers_is_the_naive_sum_of_squares():
    logits, labels = torch.tensor([[1.0], [2.5], [-1.0]]), torch.tensor([0.0, 2.0, -100.0])
    assert float(text_loss(logits, labels)) == 1.0 + 0.25 + 99.0**2
    assert supervised_tokens(labels) == 3  # a number may be -100


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.tensor([0.5, 1.0])], ids=["labels", "numbers"])
def test_half_precision_logits_are_brought_to_float32(labels):
    logits = torch.randn(2, 1 if labels.is_floating_point() else 3).bfloat16()
    loss = text_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, text_loss(logits.float(), labels))


def test_the_loss_of_nothing_labelled_is_nought_with_a_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = text_loss(logits, torch.tensor([-100, -100]))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("shape", [(4, 7, 13), (4,), (3, 2)])
def test_logits_of_a_model_without_a_head_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[4, labels\] is wanted: give the backbone the head"):
        text_loss(torch.zeros(shape), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[4, 1\] is wanted"):
        text_loss(torch.zeros(4, 2), torch.zeros(4))


def test_real_tokens_are_counted_as_ever():
    batch = collate(rows(4))
    assert valid_tokens(batch) == sum(len(ids) for ids, _ in rows(4))


def mean_by_hand(model, chosen):
    """The oracle: one text at a time, no padding."""
    total = 0.0
    for ids, y in chosen:
        logits = model(torch.tensor([ids]), torch.ones(1, len(ids))).logits[0]
        total = total + ((logits[0] - torch.tensor(y)) ** 2 if isinstance(y, float) else -logits.log_softmax(-1)[y])
    return total / len(chosen)


def adamw(batch_size):
    return recipe(max_steps=3, batch_size=batch_size, optimizer=AdamWConfig(), learning_rate=0.05, clip_norm=0.3)


def in_parts(model, sizes_of_steps, data):
    """Optimizer steps over `data` in order, each cut into micro-batches of these sizes; the losses told."""
    config = adamw(4)
    learner = build_learner(model, config, make_accelerator(config.training, torch.device("cpu")), len(sizes_of_steps))
    left, losses = list(data), []
    for number, sizes in enumerate(sizes_of_steps):
        batches = []
        for size in sizes:
            batches.append(collate(left[:size]))
            left = left[size:]
        census = take_census(learner, batches, 0)
        assert census.supervised == sum(sizes)
        losses.append(take_step(learner, batches, census, config.training.clip_norm, first=number == 0).loss)
    assert not left
    return losses


@pytest.mark.parametrize("outputs", [3, 1], ids=["labels", "numbers"])
def test_micro_batches_equal_one_batch_with_an_unequal_last_one(outputs):
    data = rows(23, outputs)
    whole, cut = ToyTexts(outputs), ToyTexts(outputs)
    of_whole = in_parts(whole, [[9], [9], [5]], data)
    of_cut = in_parts(cut, [[4, 4, 1], [4, 4, 1], [4, 1]], data)
    assert max(abs(a - b) for a, b in zip(of_whole, of_cut, strict=True)) < 1e-12
    for mine, theirs, before in zip(cut.parameters(), whole.parameters(), ToyTexts(outputs).parameters(), strict=True):
        assert float((mine - theirs).detach().abs().max()) < 1e-12
        assert not mine.requires_grad or not torch.equal(mine, before)


def test_the_toy_texts_tell_a_mean_of_means_from_a_mean():
    data, model = rows(9), ToyTexts()
    means = [float(mean_by_hand(model, part).detach()) for part in (data[:4], data[4:8], data[8:])]
    assert abs(sum(means) / 3 - float(mean_by_hand(model, data).detach())) > 1e-4


@pytest.mark.parametrize("outputs", [3, 1], ids=["labels", "numbers"])
@pytest.mark.parametrize("parts", [1, 2, 6])
def test_a_step_of_fit_equals_one_by_hand(outputs, parts, tmp_path):
    data, model = rows(12, outputs), ToyTexts(outputs)
    expected = copy.deepcopy(model)
    loss = mean_by_hand(expected, data)
    loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    fed = TrainingData(train=data, collate=collate, order=lambda epoch: list(range(12)))
    config = recipe(max_steps=1, learning_rate=0.1, micro_batch_size=12 // parts)
    result = fit_toy(model, tmp_path, config, fed)
    tolerance = 1e-12 if outputs > 1 else 1e-6  # numbers of a batch are float32
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert float((mine - theirs).detach().abs().max()) < tolerance
    assert abs(lines(tmp_path, "train")[0]["loss"] - float(loss.detach())) < tolerance
    assert (result.supervised_tokens, result.tokens) == (12, sum(len(ids) for ids, _ in data))


def test_the_optimizer_steps_once_for_every_batch_begun(tmp_path):
    data = rows(10)
    fed = TrainingData(train=data, collate=collate, order=lambda epoch: list(range(10)))
    config = recipe(max_steps=None, epochs=1.0, batch_size=4, micro_batch_size=2)
    assert fit_toy(ToyTexts(), tmp_path, config, fed).steps == 3
    stream = SampleStream(fed, plan_layout(config.training, 1))
    assert [len(stream.micro_batches(step, 0)) for step in (1, 2, 3)] == [2, 2, 2]


# ---- which evaluation is the best
@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ({}, {"validation_loss": 1.0}, ("validation_loss", "min")),
        ({}, {"validation_loss": 1.0, "validation_score": 0.5}, ("validation_score", "max")),
        ({"best_metric": "validation_loss"}, {"validation_score": 0.5}, ("validation_loss", "min")),
        ({"best_metric": "validation_loss/rte"}, {}, ("validation_loss/rte", "min")),
        ({"best_metric": "validation_f1"}, {}, ("validation_f1", "max")),
        ({"best_metric": "exact_match", "best_direction": "min"}, {}, ("exact_match", "min")),
        ({"best_direction": "min"}, {"validation_score": 0.5}, ("validation_score", "min")),
    ],
)
def test_the_metric_and_its_direction_are_found(settings, given, expected):
    assert criterion(TrainingConfig(**settings), given) == expected


def test_the_best_score_is_kept_and_of_equal_ones_the_earlier():
    selection, config = Selection(), TrainingConfig()
    seen = [(0, 0.9, 0.1), (1, 0.5, 0.9), (2, 0.7, 0.8), (3, 0.7, 0.1), (4, 0.6, 0.0)]  # step, score, loss
    taken = [
        step for step, score, loss in seen
        if selection.see(step, {"validation_loss": loss, "validation_score": score}, config)
    ]  # fmt: skip
    assert taken == [1, 2]
    assert (selection.best_step, selection.best_score) == (2, 0.7)


def test_an_evaluation_without_a_known_metric_is_refused():
    with pytest.raises(ValueError, match="unknown metric 'validation_loss'"):
        Selection().see(0, {"perplexity": 1.0}, TrainingConfig())
