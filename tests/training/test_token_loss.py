"""The loss of a step: per supervised token, however the step is cut up."""

import copy

import pytest
import torch
from training_toy import ToyModel, collate, fit_toy, lines, mean_loss, recipe, samples, toy_data

from mole.training.loss import supervised_tokens, token_loss


def test_token_loss_is_the_naive_sum_over_supervised_tokens():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(0, 7, (3, 5))
    labels[0, :3], labels[1] = -100, -100
    naive = sum(
        -float(torch.log_softmax(logits[b, t - 1], -1)[labels[b, t]])
        for b in range(3)
        for t in range(1, 5)
        if labels[b, t] != -100
    )
    assert abs(float(token_loss(logits, labels)) - naive) < 1e-12
    assert supervised_tokens(labels) == 2 + 0 + 4


def test_token_loss_of_half_precision_logits_is_computed_in_float32():
    logits, labels = torch.randn(2, 4, 7).bfloat16(), torch.randint(0, 7, (2, 4))
    loss = token_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, token_loss(logits.float(), labels))


def test_token_loss_of_nothing_supervised_is_zero_with_a_gradient():
    logits = torch.randn(2, 4, 7, requires_grad=True)
    loss = token_loss(logits, torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def one_step_by_hand(model: ToyModel, rows: list, rate: float) -> None:
    """The oracle: gradient of the mean over all supervised tokens, one sample at a time, no batches, no padding."""
    total, count = 0.0, 0
    for row in rows:
        batch = collate([row])
        output = model(batch["input_ids"])
        for place in range(1, len(row[0])):
            if row[1][place] != -100:
                total = total - torch.log_softmax(output.logits[0, place - 1], -1)[row[1][place]]
                count += 1
    (total / count).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_a_step_in_parts_equals_one_batch(parts, tmp_path):
    data, model = toy_data(12), ToyModel(dtype=torch.float64)
    expected = copy.deepcopy(model)
    loss_before = mean_loss(model, data.train)
    one_step_by_hand(expected, data.train, rate=0.5)
    fit_toy(model, tmp_path, recipe(max_steps=1, micro_batch_size=12 // parts), data)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert float((mine - theirs).detach().abs().max()) < 1e-12
    assert abs(lines(tmp_path, "train")[0]["loss"] - loss_before) < 1e-12


def test_the_toy_data_tells_a_mean_of_means_from_a_mean_over_tokens():
    model, rows = ToyModel(dtype=torch.float64), samples(12)
    of_means = sum(mean_loss(model, rows[i : i + 2]) for i in range(0, 12, 2)) / 6
    assert abs(of_means - mean_loss(model, rows)) > 1e-3


class WithAuxiliaryLoss(ToyModel):
    """Adds a mean over the real tokens, as a router does."""

    def forward(self, input_ids, attention_mask):
        output = super().forward(input_ids)
        squares = (self.embedding[input_ids] @ self.mix).pow(2).mean(-1)
        output.auxiliary_loss = (squares * attention_mask).sum() / attention_mask.sum()
        return output


@pytest.mark.parametrize("parts", [2, 6])
def test_auxiliary_losses_are_averaged_over_the_tokens_of_the_step(parts, tmp_path):
    whole, cut = WithAuxiliaryLoss(dtype=torch.float64), WithAuxiliaryLoss(dtype=torch.float64)
    fit_toy(whole, tmp_path / "whole", recipe(max_steps=2))
    fit_toy(cut, tmp_path / "cut", recipe(max_steps=2, micro_batch_size=12 // parts))
    for mine, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
        assert float((mine - theirs).detach().abs().max()) < 1e-12
    first, second = lines(tmp_path / "whole", "train")[0], lines(tmp_path / "cut", "train")[0]
    assert first["auxiliary_loss"] > 0
    assert abs(first["auxiliary_loss"] - second["auxiliary_loss"]) < 1e-12
