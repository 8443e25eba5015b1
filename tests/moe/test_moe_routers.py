"""Routers of blocks against transformers' and against what their papers say."""

import math

import pytest
import torch
from moe_cases import DIM, block, inputs, mlps
from torch.nn import functional as F

from mole.moe import MoEBlock, aux_loss
from mole.routing import Frame, RoutingContext, RoutingInputs


def dense(moe):
    return moe.batched_routing_matrix


def test_softmax_routing_with_shares_is_mixtrals():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    config = MixtralConfig(hidden_size=DIM, num_local_experts=6, num_experts_per_tok=2)
    theirs = MixtralTopKRouter(config)
    theirs.weight.data = inputs(6, DIM, seed=5)
    moe = block(6, k=2, router_norm_topk=True)
    moe.router.weight.data = theirs.weight.data.clone()
    x = inputs(1, 40, DIM)
    moe(x)
    _, weights, ids = theirs(x[0])
    torch.testing.assert_close(moe.last.weights[0], weights, atol=1e-6, rtol=1e-5)
    assert torch.equal(moe.last.expert_ids[0], ids)


@pytest.mark.parametrize("shares", [True, False])
def test_sigmoid_routing_with_groups_and_bias_is_deepseeks(shares):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    options = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5}
    config = DeepseekV3Config(
        hidden_size=DIM,
        moe_intermediate_size=4,
        n_routed_experts=8,
        norm_topk_prob=shares,
        n_shared_experts=1,
        **options,
    )
    theirs = DeepseekV3TopkRouter(config)
    moe = block(
        8,
        k=3,
        router_score="sigmoid",
        router_num_groups=4,
        router_topk_groups=2,
        router_norm_topk=shares,
        router_route_scale=2.5,
        router_bias_rate=1e-3,
    )
    theirs.weight.data = inputs(8, DIM, seed=5)
    theirs.e_score_correction_bias.data = 0.3 * inputs(8, seed=6).abs()
    moe.router.weight.data = theirs.weight.data.clone()
    moe.router.bias.copy_(theirs.e_score_correction_bias)
    x = inputs(1, 60, DIM)
    moe(x)
    _, weights, ids = theirs(x[0])
    found = torch.zeros(60, 8).scatter(-1, ids, weights)
    torch.testing.assert_close(dense(moe)[0], found, atol=1e-6, rtol=1e-5)


def test_cosine_scores_are_of_directions_only():
    moe = block(5, k=2, router_score="cosine", router_proj_dim=6)
    x = inputs(2, 7, DIM)
    moe(x)
    before = dense(moe)
    moe(3 * x)
    torch.testing.assert_close(dense(moe), before, atol=1e-5, rtol=1e-4)
    read = F.normalize(x @ moe.router.projection.T, dim=-1) @ F.normalize(moe.router.weight, dim=-1).T
    p = torch.softmax(read * moe.router.log_scale.exp(), dim=-1)
    torch.testing.assert_close(before.sum(-1), p.topk(2).values.sum(-1), atol=1e-6, rtol=1e-5)


def test_equal_scores_go_to_the_first_experts():
    moe = block(6, k=2)
    moe.router.weight.data.zero_()
    moe(inputs(2, 5, DIM))
    assert (moe.last.expert_ids == torch.tensor([0, 1])).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"aggregation": "mean"}, {"router_norm_topk": True, "router_straight_through": True}],
    ids=["sum", "mean", "norm_topk"],
)
@pytest.mark.parametrize("name", ["top_k", "expert_choice"])
def test_the_router_of_one_slot_learns(options, name):
    if name == "expert_choice":
        options = {key: value for key, value in options.items() if key != "router_straight_through"}
    moe = block(4, router_name=name, **options)
    (moe(inputs(2, 6, DIM)) * inputs(2, 6, DIM, seed=2)).sum().backward()
    assert moe.router.weight.grad.abs().max() > 1e-4


def test_a_chosen_probability_of_nearly_nothing_leaves_gradients_finite():
    moe = block(3, router_norm_topk=True, router_straight_through=True, expert_dropout=0.0, router_temperature=1e-3)
    x = 100 * inputs(1, 8, DIM)
    bias = torch.tensor([0.0, 0.0, 10.0])  # chooses what the softmax gives nothing
    moe.router.register_buffer("bias", bias)
    y = moe(x)
    assert (moe.last.expert_ids == 2).all()
    y.sum().backward()
    assert y.isfinite().all()
    assert moe.router.weight.grad.isfinite().all()
    torch.testing.assert_close(y, moe.experts[2](x), atol=1e-4, rtol=1e-4)


# ---- expert choice
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 100.0])
def test_expert_choice_fills_every_expert_exactly(factor):
    moe = block(4, router_name="expert_choice", router_capacity_factor=factor)
    moe(inputs(3, 10, DIM))
    size = min(10, math.ceil(factor * 10 / 4))
    per_sequence = (dense(moe) != 0).sum(1)
    assert (per_sequence == size).all()
    if factor in (1.0, 2.0) and 10 * factor % 4 == 0:
        assert float((dense(moe) != 0).sum() / 30) == factor


def test_expert_choice_takes_the_best_tokens_of_each_sequence_and_weighs_them_with_the_softmax():
    moe, x = block(3, router_name="expert_choice", k=2), inputs(2, 7, DIM)
    y = moe(x)
    p = torch.softmax(x @ moe.router.weight.T, dim=-1)
    wanted = torch.zeros_like(p)
    for row in range(2):
        for expert in range(3):
            best = p[row, :, expert].topk(2).indices
            wanted[row, best, expert] = p[row, best, expert]
    torch.testing.assert_close(dense(moe), wanted, atol=1e-6, rtol=1e-5)
    outputs = torch.stack([expert(x) for expert in moe.experts], dim=2)
    torch.testing.assert_close(y, (wanted[..., None] * outputs).sum(2), atol=1e-6, rtol=1e-5)


def test_expert_choice_counts_the_real_tokens_of_each_sequence():
    moe = block(2, router_name="expert_choice", router_capacity_factor=1.0)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, :6] = mask[1, :3] = True
    moe(inputs(2, 8, DIM), padding_mask=mask)
    assert (dense(moe) != 0).sum(1).tolist() == [[3, 3], [2, 2]]
    assert not dense(moe)[~mask].any()


@pytest.mark.parametrize("name", ["expert_choice", "soft"])
def test_routers_that_look_ahead_are_refused_in_decoders(name):
    with pytest.raises(ValueError, match="depend on later tokens"):
        block(3, router_name=name, causal=True)
    block(3, router_name=name, causal=True, allow_noncausal=True)
    with pytest.raises(ValueError, match="depend on later tokens"):
        MoEBlock(mlps(2), expert_choice=True, causal=True)


@pytest.mark.parametrize("options", [{}, {"k": 2, "router_norm_topk": True}, {"router_name": "round_robin"}])
def test_token_choice_sees_no_later_token(options):
    moe, x = block(4, **options), inputs(1, 9, DIM)
    other = torch.cat([x[:, :5], inputs(1, 4, DIM, seed=9)], dim=1)
    torch.testing.assert_close(moe(x)[:, :5], moe(other)[:, :5], atol=1e-6, rtol=1e-5)


# ---- soft
def test_soft_slots_are_mixtures_of_tokens_and_tokens_of_slots():
    moe, x = block(3, router_name="soft", router_slots=2), inputs(2, 5, DIM)
    logits = F.normalize(x, dim=-1) @ (moe.router.scale * F.normalize(moe.router.weight, dim=-1)).T
    slots = torch.softmax(logits, dim=1).transpose(1, 2) @ x
    made = torch.stack([moe.experts[slot // 2](slots[:, slot]) for slot in range(6)], dim=1)
    torch.testing.assert_close(moe(x), torch.softmax(logits, dim=-1) @ made, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moe.routing_matrix.sum(-1), torch.ones(10))


# ---- depth
def test_depth_passes_the_best_tokens_with_their_gates_and_leaves_the_others():
    for residual in ("outside", "inside"):
        moe = block(1, router_name="depth", router_capacity_factor=0.25, router_residual=residual)
        x = inputs(2, 8, DIM)
        y, s = moe(x), x @ moe.router.weight[0]
        passed = torch.zeros(2, 8, dtype=torch.bool).scatter(1, s.topk(2, dim=1).indices, True)
        gate = torch.sigmoid(s)[..., None]
        rest = torch.zeros_like(x) if residual == "outside" else x
        inside = gate * moe.experts[0](x) + (0 if residual == "outside" else (1 - gate) * x)
        torch.testing.assert_close(y, torch.where(passed[..., None], inside, rest), atol=1e-6, rtol=1e-5)


def test_depth_generates_with_its_predictor_once_that_is_trained():
    moe = block(1, router_name="depth", router_capacity_factor=0.5)
    moe.context = RoutingContext()
    x = inputs(2, 8, DIM)
    with moe.context.push(Frame(generating=True)), pytest.raises(RuntimeError, match="never trained"):
        moe.eval()(x)
    moe.train()
    optimizer = torch.optim.Adam(moe.router.predictor.parameters(), lr=3e-2)
    before = moe.router.weight.clone()
    for _ in range(150):
        moe(x)
        optimizer.zero_grad()
        moe.aux_loss.backward()
        optimizer.step()
    assert moe.router.weight.grad is None
    assert torch.equal(before, moe.router.weight)
    wanted = moe.eval()(x)
    with moe.context.push(Frame(generating=True)):
        torch.testing.assert_close(moe(x), wanted, atol=1e-6, rtol=1e-5)


# ---- hash, round robin
def test_hash_goes_by_the_token_id_alone():
    moe, ids = block(5, k=2, router_name="hash"), torch.randint(0, 1000, (4, 50), generator=torch.Generator())
    moe(inputs(4, 50, DIM), token_ids=ids)
    first = moe.last.expert_ids
    moe(inputs(4, 50, DIM, seed=8), token_ids=ids)
    assert torch.equal(first, moe.last.expert_ids)
    assert (first[..., 0] != first[..., 1]).all()
    assert int(torch.bincount(first[..., 0].flatten(), minlength=5).min()) > 20
    for token in ids.unique()[:5]:
        assert len(first[ids == token].unique(dim=0)) == 1
    with pytest.raises(ValueError, match="needs token ids"):
        moe(inputs(4, 50, DIM))
    with pytest.raises(ValueError, match="give one id for each"):
        moe(inputs(4, 50, DIM), token_ids=ids[:, 1:])
    moe.context = RoutingContext()
    with moe.context.push(Frame(inputs=RoutingInputs(input_ids=ids))):
        moe(inputs(4, 50, DIM))
    assert torch.equal(first, moe.last.expert_ids)


def test_a_block_without_any_parameter_has_losses_of_zero():
    moe = block([torch.nn.Identity()], router_name="round_robin")
    assert torch.equal(moe(inputs(1, 3, DIM)), inputs(1, 3, DIM))
    assert moe.aux_loss.item() == aux_loss(moe).item() == 0


def test_round_robin_is_balanced_over_real_tokens():
    moe, mask = block(4, k=2, router_name="round_robin"), torch.ones(2, 10, dtype=torch.bool)
    mask[0, 5:] = mask[1, 3:] = False
    moe(inputs(2, 10, DIM), padding_mask=mask)
    assert moe.abs_experts_load().tolist() == [4, 4, 4, 4]


# ---- samples as a whole
def test_images_are_routed_one_by_one_by_the_mean_of_their_channels():
    convolutions = [torch.nn.Conv2d(3, 6, 3) for _ in range(3)]
    moe, x = block(convolutions, route="images", k=2, aggregation="mean"), inputs(5, 3, 8, 10)
    y = moe(x)
    assert y.shape == (5, 6, 6, 8)
    p = torch.softmax(x.mean((2, 3)) @ moe.router.weight.T, dim=-1)
    weights, ids = p.topk(2)
    for row in range(5):
        wanted = sum(w * convolutions[e](x[row, None]) for w, e in zip(weights[row], ids[row], strict=True))
        torch.testing.assert_close(y[row, None], wanted / weights[row].sum(), atol=1e-5, rtol=1e-4)


def test_sequences_are_routed_by_the_mean_of_their_real_tokens():
    moe, x = block(3, route="sequence"), inputs(4, 6, DIM)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2] = False
    y = moe(x, padding_mask=mask)
    assert moe.last.weights.shape == (4, 1, 1)
    assert not y[~mask].any()
    alone = moe(x[1:2, :4])
    torch.testing.assert_close(y[1:2, :4], alone, atol=1e-6, rtol=1e-5)
    assert y[0].any()


# ---- what is no number
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "options",
    [
        {"k": 1},
        {"k": 2, "aggregation": "mean"},
        {"k": 2, "router_score": "sigmoid", "router_bias_rate": 0.1},
        {"k": 2, "router_num_groups": 2, "router_topk_groups": 1},
        {"k": 2, "router_noise": "simple"},
        {"k": 3, "router_name": "expert_choice"},
        {"k": 3, "router_name": "expert_choice", "aggregation": "mean"},
    ],
)
def test_what_is_no_number_in_a_token_is_none_in_its_output(options, value):
    moe, x = block(4, **options).eval(), inputs(2, 6, DIM)
    x[1, 2, 0] = value
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    x[0, 5] = float("nan")  # of padding it stays without effect
    y = moe(x, padding_mask=mask)
    assert not y[1, 2].isfinite().any()
    assert y[0].isfinite().all()
