"""Capacity: who is dropped and what becomes of it; null experts."""

import math

import pytest
import torch
from moe_cases import DIM, block, inputs, mlps

from mole.moe.capacity import limited
from mole.moe.config import CapacityConfig
from mole.routing import Routing


@pytest.mark.parametrize("drop_order", ["priority", "position"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5])
def test_no_expert_takes_more_than_its_capacity_and_every_slot_is_accounted_for(factor, drop_order):
    moe = block(
        4, k=2, null_experts=("zero",), capacity_factor=factor, capacity_minimum=1, capacity_drop_order=drop_order
    )
    moe(inputs(3, 20, DIM))
    loads, ids = moe.abs_experts_load(), moe.last.expert_ids
    assert int(loads[:4].max()) <= math.ceil(factor * 60 * 2 / 4)
    assert int(loads.sum() + (ids == -1).sum()) == 60 * 2
    assert not moe.last.weights[ids == -1].any()


def test_a_large_factor_drops_nobody():
    for order in ("priority", "position"):
        with_capacity = block(4, k=2, capacity_factor=1e9, capacity_drop_order=order)
        x = inputs(2, 9, DIM)
        assert torch.equal(with_capacity(x), block(4, k=2)(x))


def naive(ids, gates, room, order):
    """Which slots [N, K] are kept, slot by slot."""
    tokens, k = ids.shape
    taken, keep = {}, torch.zeros(tokens, k, dtype=torch.bool)
    for choice in range(k):
        turn = range(tokens) if order == "position" else sorted(range(tokens), key=lambda t: -float(gates[t, choice]))
        for token in turn:
            expert = int(ids[token, choice])
            if expert < 0:
                continue
            taken[expert] = taken.get(expert, 0) + 1
            keep[token, choice] = taken[expert] <= room
    return keep


@pytest.mark.parametrize("order", ["priority", "position"])
def test_slots_are_granted_in_the_stated_order(order):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 15, 5, generator=generator)
    gates, ids = scores.topk(3, dim=-1)
    routing = Routing(gates, ids)
    config = CapacityConfig(factor=0.7, minimum=1, drop_order=order)
    found, limit = limited(routing, None, config, 0.7, 5)
    room = math.ceil(0.7 * 30 * 3 / 5)
    assert limit == room
    wanted = naive(ids.flatten(0, 1), gates.flatten(0, 1), room, order)
    assert not wanted.all()
    assert torch.equal((found.expert_ids >= 0).flatten(0, 1), wanted)


def test_capacity_counts_real_tokens_only():
    moe = block(2, k=1, capacity_factor=1.0, capacity_minimum=1)
    x, mask = inputs(2, 10, DIM), torch.zeros(2, 10, dtype=torch.bool)
    mask[:, :3] = True
    moe.router.weight.data[1] = 0
    moe(x, padding_mask=mask)
    assert int(moe.abs_experts_load().max()) <= 3  # of 6 real tokens on 2 experts


def test_a_token_without_a_slot_depends_on_no_expert():
    for dropped in ("zero", "identity"):
        moe = block(3, k=1, capacity_factor=0.5, capacity_minimum=1, capacity_dropped=dropped)
        x = inputs(1, 12, DIM)
        y = moe(x)
        idle = (moe.last.expert_ids < 0).all(-1)
        assert idle.any()
        wanted = torch.zeros_like(x) if dropped == "zero" else x
        assert torch.equal(y[idle], wanted[idle])
        moe.zero_grad()
        y[idle].sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in moe.parameters())


def test_eval_has_a_capacity_of_its_own():
    moe, x = block(2, capacity_eval_factor=0.5, capacity_minimum=1), inputs(1, 12, DIM)
    moe(x)
    assert not (moe.last.expert_ids < 0).any()
    moe.eval()(x)
    assert (moe.last.expert_ids < 0).any()


# ---- null experts
def into_null(moe, place):
    """The block, whose router gives every token with a positive first number to a null expert."""
    moe.router.weight.data.zero_()
    moe.router.weight.data[moe.num_experts + place, 0] = 50.0
    return moe


def positive(*shape):
    x = inputs(*shape)
    return torch.cat([x[..., :1].abs() + 1, x[..., 1:]], dim=-1)


@pytest.mark.parametrize("backend", ["loop", "vmap", "grouped", "stacked"])
def test_a_token_in_the_hole_gives_zero_and_calls_no_expert(backend):
    experts = mlps(3)
    called = []
    moe = into_null(block(experts, null_experts=("zero",), backend=backend), 0)
    x = positive(2, 5, DIM)
    for expert in experts:
        expert.register_forward_hook(lambda *_: called.append(1))
    y = moe(x)
    assert torch.equal(y, torch.zeros_like(x))
    if backend == "loop":
        assert len(called) <= 1  # the shape of an output is asked for, once
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in moe.experts.parameters())


def test_an_identity_gives_the_token_back_and_a_constant_what_it_learned():
    x = positive(2, 5, DIM)
    identity = into_null(block(3, null_experts=("zero", "identity")), 1)
    torch.testing.assert_close(identity(x), x, atol=1e-6, rtol=1e-5)
    constant = into_null(block(3, null_experts=("constant",)), 0)
    assert not constant(x).any()
    constant.nulls.constant_0.data = inputs(DIM)
    torch.testing.assert_close(constant(x), inputs(DIM).expand(2, 5, DIM), atol=1e-6, rtol=1e-5)
    constant(x).sum().backward()
    assert constant.nulls.constant_0.grad.any()


def test_an_identity_needs_the_width_of_the_input():
    moe = into_null(block(mlps(2, out=5), null_experts=("identity",)), 0)
    with pytest.raises(ValueError, match="identity needs experts whose output"):
        moe(positive(1, 3, DIM))


def test_null_experts_are_the_last_columns_under_their_names():
    moe = block(3, k=2, null_experts=("zero", "identity"))
    moe(inputs(2, 9, DIM))
    assert moe.choice_names == ["0", "1", "2", "zero", "identity"]
    assert moe.routing_matrix.shape == (18, 5)
    assert moe.experts_load().shape == (5, 9)
    assert int(moe.abs_experts_load().sum()) == 18 * 2


def test_losses_are_those_of_the_real_experts_and_zero_if_all_tokens_are_in_the_hole():
    losses = {"load_balance": 1.0, "importance_cv2": 1.0, "balance_entropy": 1.0}
    moe = into_null(block(3, null_experts=("zero",), router_losses=losses), 0)
    moe(positive(2, 5, DIM))
    assert moe.aux_loss.item() == 0
    moe.aux_loss.backward()
    assert moe.router.weight.grad.isfinite().all()
    moe.router.weight.data.zero_()  # even: a quarter for each of four choices, all slots at expert 0
    moe(positive(2, 5, DIM))
    assert float(moe.losses["importance_cv2"]) == pytest.approx(0, abs=1e-6)
    assert float(moe.losses["load_balance"]) == pytest.approx(1, abs=1e-6)


def test_null_rate_draws_the_share_of_null_slots_to_its_target():
    torch.manual_seed(0)
    moe = block(4, k=2, null_experts=("zero",) * 2, router_losses={"null_rate": 1.0}, null_target=0.4)
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=1e-2)
    moe.router.weight.data[4:] = -abs(moe.router.weight.data[:4]).sum(0)
    x = positive(4, 64, DIM).abs()
    moe(x)
    before = float((moe.last.expert_ids >= 4).float().mean())
    for _ in range(200):
        optimizer.zero_grad()
        moe(x)
        moe.aux_loss.backward()
        optimizer.step()
    after = float((moe.last.expert_ids >= 4).float().mean())
    assert abs(after - 0.4) < 0.1 < abs(before - 0.4)
