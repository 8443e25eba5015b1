"""Losses of blocks: values at balance and at collapse, transformers' as an oracle, how they are delivered."""

import math

import pytest
import torch
from moe_cases import DIM, block, inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

from mole.moe import MoEBlock, aux_loss

BALANCE = ["load_balance", "importance_cv2", "load_cv2", "balance_entropy"]


def value(moe, x, **options):
    moe(x, **options)
    return moe.losses


def uniform(count, k=1, **options):
    """A block whose router says nothing."""
    moe = block(count, k=k, **options)
    moe.router.weight.data.zero_()
    return moe


def collapsed(count, k=1, **options):
    """All probability on k experts, for inputs with a first number of 1."""
    moe = uniform(count, k, **options)
    moe.router.weight.data[:k, 0] = 100.0
    return moe


def ones(*shape):
    x = inputs(*shape)
    x[..., 0] = 1.0
    return x


@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_balance_is_one_at_balance_and_experts_over_k_at_collapse(k):
    losses = {"load_balance": 1.0}
    assert value(uniform(6, k, router_losses=losses), ones(2, 5, DIM))["load_balance"] == pytest.approx(1)
    assert value(collapsed(6, k, router_losses=losses), ones(2, 5, DIM))["load_balance"] == pytest.approx(6 / k)


@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_times_k_is_transformers(k):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    moe = block(5, k=k, router_losses={"load_balance": 1.0})
    x, mask = inputs(3, 8, DIM), torch.ones(3, 8, dtype=torch.long)
    found = value(moe, x)["load_balance"] * k
    logits = moe.last.logits.flatten(0, 1)
    torch.testing.assert_close(found, load_balancing_loss_func((logits,), 5, k), atol=1e-6, rtol=1e-5)
    mask[1, 5:] = 0
    found = value(moe, x, padding_mask=mask)["load_balance"] * k
    wanted = load_balancing_loss_func((logits,), 5, k, mask)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_load_balance_of_one_slot_and_the_z_loss_are_switchs():
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        load_balancing_loss_func,
        router_z_loss_func,
    )

    moe = block(5, router_losses={"load_balance": 1.0, "z_loss": 1.0})
    found = value(moe, inputs(1, 30, DIM))
    logits = moe.last.logits
    p = torch.softmax(logits, dim=-1)
    torch.testing.assert_close(found["z_loss"], router_z_loss_func(logits), atol=1e-5, rtol=1e-5)
    theirs = load_balancing_loss_func(p, p.argmax(-1))
    torch.testing.assert_close(found["load_balance"], theirs, atol=1e-5, rtol=1e-5)


def test_the_others_are_zero_at_balance_and_positive_else():
    losses = dict.fromkeys(BALANCE, 1.0)
    even = value(uniform(6, 2, router_noise="normal", router_losses=losses), ones(2, 400, DIM))
    assert even["importance_cv2"] == pytest.approx(0, abs=2e-3)
    assert even["balance_entropy"] == pytest.approx(0, abs=2e-3)
    assert even["load_cv2"] == pytest.approx(0, abs=2e-2)
    full = value(collapsed(6, 1, router_noise="normal", router_losses=losses), ones(2, 40, DIM))
    assert full["importance_cv2"] == pytest.approx(5, abs=1e-3)
    assert full["load_cv2"] == pytest.approx(5, abs=1e-3)
    assert full["balance_entropy"] == pytest.approx(math.log(6), abs=1e-3)


def test_the_z_loss_of_no_scores_is_the_square_of_the_logarithm_of_their_number():
    found = value(uniform(7, router_losses={"z_loss": 1.0}), ones(1, 4, DIM))
    assert found["z_loss"] == pytest.approx(math.log(7) ** 2)


def test_sigmoid_scores_count_with_their_shares():
    moe = block(4, k=2, router_score="sigmoid", router_losses={"load_balance": 1.0})
    x = inputs(2, 9, DIM)
    found = value(moe, x)["load_balance"]
    a = torch.sigmoid(x @ moe.router.weight.T)
    P = (a / a.sum(-1, keepdim=True)).mean((0, 1))
    f = torch.bincount(moe.last.expert_ids.flatten(), minlength=4) / 36
    torch.testing.assert_close(found, (4 * (f * P).sum()).detach(), atol=1e-6, rtol=1e-5)


def test_over_sequences_is_the_mean_of_each_by_itself():
    losses = {"load_balance": 1.0, "balance_entropy": 1.0, "z_loss": 1.0}
    moe, x = block(4, k=2, losses_over="sequence", router_losses=losses), inputs(3, 6, DIM)
    whole = value(moe, x)
    each = [dict(value(moe, row[None])) for row in x]
    for name in losses:
        torch.testing.assert_close(whole[name], torch.stack([one[name] for one in each]).mean(), atol=1e-6, rtol=1e-5)


def test_under_expert_choice_they_are_about_the_tokens():
    losses = {"importance_cv2": 1.0, "balance_entropy": 1.0}
    moe, x = block(3, k=4, router_name="expert_choice", router_losses=losses), inputs(2, 9, DIM)
    found = value(moe, x)
    share = moe.batched_routing_matrix.sum(-1)
    share = share / share.sum(1, keepdim=True)
    cv2 = (9 * share.square().sum(1) - 1).mean()
    entropy = (math.log(9) + torch.xlogy(share, share).sum(1)).mean()
    torch.testing.assert_close(found["importance_cv2"], cv2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["balance_entropy"], entropy, atol=1e-5, rtol=1e-4)


def test_moefys_criteria_are_their_losses():
    def names(**options):
        return MoEBlock([nn.Linear(4, 4) for _ in range(3)], **options).coefficients

    assert names() == {"importance_cv2": 0.01, "load_cv2": 0.01}
    assert names(k=3) == {"importance_cv2": 0.01}
    assert names(noise="gumbel") == {"balance_entropy": 0.01}
    assert names(noise=None, aux_criterion="load_balance") == {"load_balance": 0.01}
    assert names(aux_criterion=None) == {}
    assert names(aux_criterion="entropy") == {"balance_entropy": 0.01}


# ---- delivery
class Two(nn.Module):
    def __init__(self, reentrant=None, **options):
        super().__init__()
        options = {"router_losses": {"balance_entropy": 0.5, "load_balance": 0.25}} | options
        self.first, self.second, self.reentrant = block(4, k=2, **options), block(3, k=2, seed=1, **options), reentrant

    def forward(self, x):
        for part in (self.first, self.second):
            x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return x


def test_the_loss_of_a_model_is_the_mean_over_its_blocks_once():
    model, x = Two(), inputs(2, 6, DIM)
    model(x)
    wanted = (model.first.aux_loss + model.second.aux_loss) / 2
    for part in (model.first, model.second):
        by_name = 0.5 * part.losses["balance_entropy"] + 0.25 * part.losses["load_balance"]
        torch.testing.assert_close(part.aux_loss.detach(), by_name)
    torch.testing.assert_close(aux_loss(model), wanted)
    assert aux_loss(model).item() == 0
    model.eval()(x)
    assert aux_loss(model).item() == 0
    with pytest.raises(ValueError, match="no MoEBlock"):
        aux_loss(nn.Linear(2, 2))


def test_an_injected_loss_has_the_gradients_of_a_collected_one():
    x = inputs(2, 6, DIM)
    collected, injected = Two(), Two(losses_mode="inject")
    (collected(x).sum() + collected.first.aux_loss + collected.second.aux_loss).backward()
    injected(x).sum().backward()
    assert aux_loss(injected).item() == 0
    for one, other in zip(collected.parameters(), injected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    plain = Two(router_losses={})
    plain(x).sum().backward()
    assert not torch.allclose(plain.first.router.weight.grad, injected.first.router.weight.grad)


@pytest.mark.parametrize("noise", ["learned", "gumbel", None])
def test_checkpointing_gives_the_same_loss_gradients_and_counts(noise):
    options = {"router_noise": noise, "router_noise_steps": 5, "router_noise_tau_end": 0.5}
    runs = []
    for reentrant in (None, False):
        model, heard = Two(reentrant, **options), []
        model.first.observers.append(lambda block, routing, mask, heard=heard: heard.append(routing.expert_ids))
        torch.manual_seed(0)
        x = inputs(2, 6, DIM).requires_grad_()
        loss = model(x).square().sum() + aux_loss(model)
        loss.backward()
        runs.append([loss.detach(), x.grad, *(p.grad for p in model.parameters()), *heard])
        assert len(heard) == 1
        assert aux_loss(model).item() == 0
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.*requires_grad=True.*")
def test_re_entrant_checkpointing_needs_injected_losses():
    x = inputs(2, 6, DIM)
    with pytest.raises(RuntimeError, match="losses_mode=inject"):
        Two(True)(x.clone().requires_grad_()).sum().backward()
    model, plain = Two(True, losses_mode="inject"), Two(losses_mode="inject")
    model(x.clone().requires_grad_()).sum().backward()
    plain(x).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
