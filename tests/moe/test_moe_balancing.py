"""Balancing at work: each loss alone, and the bias, bring a skewed router back; without any it stays as it is."""

import pytest
import torch
from moe_cases import DIM, block, inputs
from torch import nn

from mole.moe import MoEBlock, update_router_bias

STEPS = 200
MARK = 2.0  # what a constant feature is worth for one expert


def skewed(**options) -> MoEBlock:
    """8 experts, k = 2: the last feature, 1 in all tokens, draws them to expert 0."""
    experts = [nn.Linear(DIM + 1, DIM) for _ in range(8)]
    moe = block(experts, k=2, **options)
    moe.router.weight.data *= 0.3
    moe.router.weight.data[:, -1] = 0
    moe.router.weight.data[0, -1] = MARK
    return moe


def tokens(count: int = 512):
    return torch.cat([inputs(1, count, DIM), torch.ones(1, count, 1)], dim=-1)


def violation(moe, x):
    training = moe.training
    moe.eval()(x)
    loads = moe.abs_experts_load().float()
    moe.train(training)
    return (loads.max() / loads.mean() - 1).item()


def busiest(moe, x):
    return (violation(moe, x) + 1) / moe.num_experts


@pytest.mark.parametrize("name", ["balance_entropy", "importance_cv2", "load_cv2", "load_balance", None])
def test_each_loss_alone_balances_a_skewed_router_and_none_leaves_it(name):
    torch.manual_seed(0)
    noise = "normal" if name == "load_cv2" else None
    moe, x = skewed(router_noise=noise, router_losses={name: 1.0} if name else {}), tokens()
    before, share = violation(moe, x), busiest(moe, x)
    assert before > 2
    assert share > 2 / 8
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        y = moe(x)
        (moe.aux_loss if name else 0.0 * y.sum()).backward()
        optimizer.step()
    after = violation(moe, x)
    if name is None:
        assert after == pytest.approx(before)
    else:
        assert after < before / 2
        assert busiest(moe, x) < 2 / 8


def test_the_bias_alone_balances_a_skewed_router_and_leaves_gates_alone():
    moe, x = skewed(router_score="sigmoid", router_bias_rate=5e-3), tokens()
    before = violation(moe, x)
    for _ in range(STEPS):
        moe(x)
        update_router_bias(moe)
    assert violation(moe, x) < 0.1 < before
    assert busiest(moe, x) < 2 / 8
    assert moe.router.bias.mean().item() == pytest.approx(0, abs=1e-6)
    gates = torch.sigmoid(x @ moe.router.weight.T).gather(-1, moe.last.expert_ids)
    torch.testing.assert_close(moe.last.weights, gates)
    assert "router.bias" in moe.state_dict()


def test_the_bias_counts_forwards_of_training_between_updates():
    moe, x = skewed(router_score="sigmoid", router_bias_rate=0.1), tokens(64)
    start = moe.router.bias.clone()
    update_router_bias(moe)
    assert torch.equal(moe.router.bias, start)  # nothing was counted
    counts = torch.zeros(8)
    for part in x.split(16, dim=1):  # four micro-batches of one step
        moe(part)
        counts += moe.abs_experts_load()
    assert torch.equal(moe.router.bias, start)
    moe.eval()(x)
    update_router_bias(moe)
    moved = 0.1 * torch.sign(counts.mean() - counts)
    torch.testing.assert_close(moe.router.bias, moved - moved.mean())


def test_recomputation_counts_nothing():
    from torch.utils.checkpoint import checkpoint

    moe, x = skewed(router_score="sigmoid", router_bias_rate=0.1), tokens(64)
    checkpoint(moe, x, use_reentrant=False).sum().backward()
    assert int(moe.ledger.take_counts().sum()) == 64 * 2
