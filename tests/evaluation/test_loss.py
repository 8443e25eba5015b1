"""Mean loss: against a naive float64 loop over single samples."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mole.data import IGNORED, Sample, collate
from mole.evaluation import TaskLoss, mean_loss, total
from mole.evaluation.mode import evaluating


def sample(ids, prompt, task="a"):
    labels = tuple(IGNORED if i < prompt else token for i, token in enumerate(ids))
    return Sample(tuple(ids), labels, task, "", "", tuple(ids[:prompt]))


SAMPLES = [
    sample([1, 5, 9, 4, 2], 2),
    sample([1, 7, 2], 1, "b"),
    sample([1, 8, 3, 3, 6, 11, 2], 4),
    sample([9, 8, 7, 6], 0, "b"),  # plain text: its first token has nothing before it
    sample([1, 4, 4, 12, 13, 2], 5),
]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def plain(samples, **kwargs):
    batch = collate(samples, pad_token_id=2, **kwargs)
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}


def naive(model, task):
    terms = []
    for one in SAMPLES:
        if one.task != task:
            continue
        logits = model(input_ids=torch.tensor([one.input_ids])).logits[0].detach().double()
        for position in range(1, len(one.input_ids)):
            if one.labels[position] != IGNORED:
                scores = [math.exp(x) for x in logits[position - 1].tolist()]
                terms.append(-math.log(scores[one.labels[position]] / sum(scores)))
    return sum(terms) / len(terms), len(terms)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_per_task_is_that_of_single_samples_in_float64(llama, batch_size, side):
    found = mean_loss(llama, SAMPLES, partial(plain, padding_side=side), batch_size=batch_size)
    assert list(found) == ["a", "b"]
    for task, (loss, tokens) in found.items():
        expected, count = naive(llama, task)
        assert tokens == count
        assert loss == pytest.approx(expected, rel=1e-6)


def test_positions_taken_in_parts_give_the_same_loss(llama, monkeypatch):
    whole = mean_loss(llama, SAMPLES, plain, batch_size=5)
    monkeypatch.setattr("mole.evaluation.loss.POSITIONS_AT_ONCE", 2)
    parts = mean_loss(llama, SAMPLES, plain, batch_size=5)
    assert parts.keys() == whole.keys()
    for task in whole:
        assert parts[task].loss == pytest.approx(whole[task].loss, rel=1e-6)


class Table(nn.Module):
    """Logits that depend on the token alone: no arithmetic whose rounding a batch could change."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
        self.dropout = nn.Dropout(0.5)
        self.seen = []

    def forward(self, input_ids, **others):
        self.seen.append(others)
        return SimpleNamespace(logits=self.dropout(self.logits[input_ids]))


def test_the_loss_does_not_depend_on_batch_size_or_order_by_a_bit():
    model = Table()
    losses = {mean_loss(model, SAMPLES, plain, batch_size=n)["a"].loss for n in (1, 2, 3, 4, 5)}
    assert len(losses) == 1


def test_labels_on_padding_never_count():
    def careless(samples):
        batch = plain(samples)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["labels"].eq(IGNORED) & (batch["attention_mask"] == 1), IGNORED)}  # fmt: skip # noqa: E501

    model = Table()
    assert mean_loss(model, SAMPLES, careless, batch_size=5) == mean_loss(model, SAMPLES, plain, batch_size=5)


def test_every_key_of_the_batch_but_the_labels_reaches_the_model():
    model = Table()
    mean_loss(model, SAMPLES, partial(collate, pad_token_id=2), batch_size=2)
    assert [set(others) for others in model.seen] == [{"attention_mask", "prompt_mask", "task_names", "texts"}] * 3
    assert model.seen[0]["task_names"] == ["a", "a"]  # the longest samples first


def test_training_flags_and_gradients_are_as_before_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.Dropout())
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not model[1](torch.ones(1, 2)).requires_grad
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    assert model[1](torch.ones(1, 2)).requires_grad


def test_dropout_is_off_while_evaluating_a_model_in_training():
    model = Table()
    expected = mean_loss(model.eval(), SAMPLES, plain, batch_size=5)
    assert mean_loss(model.train(), SAMPLES, plain, batch_size=5) == expected
    assert model.training
    assert model.dropout.training


def test_the_total_weighs_every_token_alike():
    assert total([TaskLoss(1.0, 30), TaskLoss(4.0, 10)]) == TaskLoss(1.75, 40)


def test_a_model_that_gives_nan_has_the_loss_nan():
    model = Table()
    with torch.no_grad():
        model.logits.fill_(float("nan"))
    assert math.isnan(mean_loss(model, SAMPLES, plain, batch_size=2)["a"].loss)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        mean_loss(Table(), [], plain, batch_size=1)
    with pytest.raises(ValueError, match="batch_size"):
        mean_loss(Table(), SAMPLES, plain, batch_size=0)
    with pytest.raises(ValueError, match="task 'c' has no supervised token"):
        mean_loss(Table(), [*SAMPLES, sample([1, 2], 2, "c")], plain, batch_size=2)
