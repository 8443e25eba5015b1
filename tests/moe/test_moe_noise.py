"""Noise of blocks in training: what it samples, and its gradients."""

import itertools
import math

import pytest
import torch
from moe_cases import DIM, block, inputs

from mole.moe.subsets import marginals, sampled, subset


def enumerated(scores, k):
    """μ by going over all subsets."""
    subsets = list(itertools.combinations(range(len(scores)), k))
    logits = torch.stack([scores[list(one)].sum() for one in subsets])
    p = torch.softmax(logits, dim=0)
    marks = torch.tensor([[e in one for e in range(len(scores))] for one in subsets], dtype=scores.dtype)
    return p @ marks


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_gradients_of_subsets_are_those_of_their_marginals(k):
    scores = inputs(5, dtype=torch.float64).requires_grad_()
    v = inputs(5, seed=1, dtype=torch.float64)
    torch.testing.assert_close(marginals(scores, k), enumerated(scores, k), atol=1e-9, rtol=1e-9)
    (wanted,) = torch.autograd.grad(enumerated(scores, k) @ v, scores)
    (found,) = torch.autograd.grad(subset(scores, k) @ v, scores)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert (k == 5) == (not wanted.abs().max() > 1e-9)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_subsets_come_with_their_probabilities(k):
    torch.manual_seed(0)
    scores, draws = inputs(5), 20_000
    found = sampled(scores.expand(draws, 5), k)
    assert (found.sum(-1) == k).all()
    subsets = list(itertools.combinations(range(5), k))
    p = torch.softmax(torch.stack([scores[list(one)].sum() for one in subsets]), dim=0)
    for one, chance in zip(subsets, p.tolist(), strict=True):
        share = float(found[:, list(one)].all(-1).float().mean())
        assert abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / draws) + 1e-9


def test_simple_noise_weighs_the_drawn_experts_with_the_softmax():
    moe, x = block(5, k=2, router_noise="simple"), inputs(1, 50, DIM)
    torch.manual_seed(1)
    moe(x)
    p = torch.softmax(x @ moe.router.weight.T, dim=-1)
    torch.testing.assert_close(moe.last.weights, p.gather(-1, moe.last.expert_ids), atol=1e-6, rtol=1e-5)
    assert not torch.equal(moe.last.expert_ids.sort().values, p.topk(2).indices.sort().values)
    moe.eval()(x)
    assert torch.equal(moe.last.expert_ids, p.topk(2).indices)


def test_simple_noise_with_expert_choice_draws_tokens_of_each_sequence():
    moe = block(3, k=4, router_name="expert_choice", router_noise="simple")
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 3:] = False
    torch.manual_seed(1)
    y = moe(inputs(2, 9, DIM), padding_mask=mask)
    assert (moe.batched_routing_matrix != 0).sum(1).tolist() == [[4] * 3, [3] * 3]
    y.sum().backward()
    assert moe.router.weight.grad.isfinite().all()


def test_gumbel_noise_samples_experts_with_their_probabilities():
    moe, x = block(3, router_noise="gumbel"), inputs(1, 1, DIM).expand(1, 40_000, DIM)
    torch.manual_seed(0)
    moe(x)
    p = torch.softmax(x[0, 0] @ moe.router.weight.T, dim=-1)
    torch.testing.assert_close(moe.abs_experts_load() / 40_000, p.detach(), atol=0.012, rtol=0)


def test_the_temperature_of_gumbel_noise_falls_by_equal_factors_and_stays_in_eval():
    moe, x = block(3, router_noise="gumbel", router_noise_tau=2.0, router_noise_tau_end=0.5, router_noise_steps=4), None
    x = inputs(1, 2, DIM)
    scores = (x @ moe.router.weight.T).detach()
    for step in range(6):
        moe.eval()(x)
        tau = 2.0 * 0.25 ** min(step / 4, 1.0)
        torch.testing.assert_close(moe.last.logits, scores / tau, atol=1e-5, rtol=1e-5)
        moe.train()(x)
    assert int(moe.state_dict()["router.tau_steps"]) == 6


def test_learned_noise_starts_at_softplus_of_zero_and_learns():
    moe, x = block(4, router_noise="learned", router_losses={"load_cv2": 1.0}), inputs(2, 4000, DIM)
    assert not moe.router.noise_weight.any()
    torch.manual_seed(0)
    y = moe(x)
    noise = moe.last.logits - (x @ moe.router.weight.T).detach()
    assert float(noise.std()) == pytest.approx(math.log(2) + 0.01, rel=0.02)
    (y.sum() + moe.aux_loss).backward()
    assert moe.router.noise_weight.grad.any()


def test_normal_noise_is_a_share_of_one_choice_and_scales():
    for scale in (1.0, 3.0):
        moe = block(3, null_experts=("zero",), router_noise="normal", router_noise_scale=scale)
        x = inputs(2, 5000, DIM)
        torch.manual_seed(0)
        moe(x)
        noise = moe.last.logits - (x @ moe.router.weight.T).detach()
        assert float(noise.std()) == pytest.approx(scale / 4, rel=0.02)


def test_jitter_is_of_the_routers_input_alone():
    experts = [torch.nn.Identity(), torch.nn.Identity()]
    moe = block([torch.nn.Linear(DIM, DIM) for _ in experts], k=2, router_noise="jitter", aggregation="mean")
    for expert in moe.experts:
        expert.weight.data, expert.bias.data = torch.eye(DIM), torch.zeros(DIM)
    x = inputs(2, 7, DIM)
    torch.testing.assert_close(moe(x), x, atol=1e-6, rtol=1e-5)
    first = moe.last.logits
    moe(x)
    assert not torch.equal(first, moe.last.logits)
    torch.testing.assert_close(first, (x @ moe.router.weight.T).detach(), atol=0.1, rtol=0.1)
