"""MoEBlock: how it is made, what it says, what stays in its state."""

import copy
import pickle
import re

import pytest
import torch
from moe_cases import DIM, block, inputs, mlp, mlps
from torch import nn

from mole.moe import CapacityConfig, MoEBlock, MoEConfig, MoERouterConfig, aux_loss


class LinearMoE(MoEBlock):
    def __init__(self, input_dim, output_dim, num_experts, *args, **kwargs):
        experts = [nn.Linear(input_dim, output_dim) for _ in range(num_experts)]
        super().__init__(input_dim=input_dim, experts=experts, *args, **kwargs)  # noqa: B026  (as MoEfy writes it)

    def expert_forward(self, expert, x):
        return expert(x)


def test_the_example_of_moefy_runs():
    moe = LinearMoE(
        k=1,
        num_experts=3,
        input_dim=4,
        output_dim=5,
        expert_choice=False,
        hole=True,
        noise="gumbel",
        aux_criterion="entropy",
        aggregation="sum",
        layer_id=0,
    )
    y = moe(inputs(2, 6, 4))
    assert y.shape == (2, 6, 5)
    assert moe.aux_loss.dim() == 0
    (y.sum() + moe.aux_loss).backward()
    assert moe.experts_load().shape == (4, 6)
    assert int(moe.experts_load().sum()) == 12
    assert len(moe.experts) == moe.num_experts == 3
    assert "layer_id=0" in repr(moe)


@pytest.mark.parametrize("expert_choice", [False, True])
@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("noise", [None, "gumbel", "simple", "gaussian", "normal", "jitter"])
@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_every_combination_of_moefys_options_trains(expert_choice, hole, noise, aggregation):
    for k in (1, 2, 3):
        moe = LinearMoE(4, 4, 3, k=k, expert_choice=expert_choice, hole=hole, noise=noise, aggregation=aggregation)
        y = moe(inputs(2, 5, 4))
        (y.square().sum() + aux_loss(moe)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())
        moe.eval()
        assert torch.equal(moe(inputs(2, 5, 4)), moe(inputs(2, 5, 4)))
        assert moe.aux_loss.item() == 0


def test_in_eval_the_output_and_the_loads_are_moefys():
    """Every expert on all tokens, the others' tokens at zero, times the softmax's probability: its dense form."""
    moe, x = block([nn.Linear(DIM, 5) for _ in range(4)], k=2).eval(), inputs(3, 7, DIM)
    p = torch.softmax(x.flatten(0, 1) @ moe.router.weight.T, dim=-1)
    chosen = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0)
    flat = x.flatten(0, 1)
    wanted = sum((p * chosen)[:, e, None] * expert(flat * chosen[:, e, None]) for e, expert in enumerate(moe.experts))
    torch.testing.assert_close(moe(x).flatten(0, 1), wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(moe.experts_load(), chosen.view(3, 7, 4).sum(0).T.long())
    torch.testing.assert_close(moe.routing_matrix, p * chosen)


def test_experts_come_from_a_list_a_factory_or_a_module():
    seen = []
    assert len(MoEBlock(lambda: mlp(0), num_experts=5).experts) == 5
    MoEBlock(lambda index: seen.append(index) or mlp(index), num_experts=3)
    assert seen == [0, 1, 2]
    module = mlp(0)
    copies = MoEBlock(module, num_experts=3, init_noise=0.1)
    assert copies.experts[0] is module
    for one, other in zip(module.parameters(), copies.experts[1].parameters(), strict=True):
        assert 0 < ((one - other).std() / one.std()).item() < 0.3
    exact = MoEBlock(module, num_experts=3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), exact.experts[2].parameters(), strict=True))
    assert exact.input_dim == DIM


def test_the_callers_list_and_modules_stay_as_they_are():
    experts = mlps(3)
    before, attributes = list(experts), [set(vars(expert)) for expert in experts]
    moe = MoEBlock(experts, hole=True, noise="gaussian")
    moe(inputs(2, 4, DIM))
    assert experts == before
    assert [set(vars(expert)) for expert in experts] == attributes


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MoEBlock([]), "empty list"),
        (lambda: MoEBlock(lambda: mlp(0)), "needs num_experts"),
        (lambda: MoEBlock(mlps(2), num_experts=3), "num_experts=3"),
        (lambda: MoEBlock(mlps(2), k=3), re.escape("k=3: valid are 1 … 2")),
        (lambda: MoEBlock(mlps(2), input_dim=4), "input_dim=4, but the experts' first linear layer takes 8"),
        (lambda: MoEBlock(mlps(2), aggregation="median", k=5), "^aggregation='median': valid is .*; k=5: valid are 1"),
        (lambda: MoEBlock([Named()], input_dim=4), re.escape("input_dim=4: expert 0 (Named) does not work on it")),
        (lambda: MoEBlock(mlps(2), config=MoEConfig(), k=2), "config and k are given"),
        (lambda: MoEBlock(mlps(2), noise="gauss"), "did you mean gaussian"),
        (lambda: MoEBlock(mlps(2), aux_criterion="prob", noise=None), "needs noise='gaussian' or 'normal'"),
        (lambda: MoEBlock(mlps(2), aux_criterion="x"), "unknown aux_criterion"),
        (lambda: MoEBlock(mlps(2), init_noise=0.1), "init_noise=0.1"),
        (lambda: MoEBlock(mlps(2), expert_choice=True, route="images"), "route=images"),
        (lambda: block(2, router_noise="gumbel", router_score="sigmoid"), "samples from a softmax"),
        (lambda: block(2, router_norm_topk=True), "has no gradient"),
        (lambda: block(2, router_bias_rate=0.1, aggregation="mean"), "fight"),
        (lambda: block(2, router_losses={"load_cv2": 1.0}), "load_cv2"),
        (lambda: block(2, router_losses={"load_balanc": 1.0}), "did you mean load_balance"),
        (lambda: block(2, router_name="soft", capacity_factor=1.0), "drops nothing"),
        (lambda: block(2, router_name="soft", null_experts=("zero",)), "hole"),
        (lambda: block(4, router_num_groups=3), "does not divide num_experts=4"),
        (lambda: block(4, router_num_groups=2, router_topk_groups=1, k=3), re.escape("valid are 1 … 2")),
        (lambda: block(4, router_num_groups=2, null_experts=("zero",)), "belong to no group"),
        (lambda: block(2, router_name="depth"), "use 1"),
        (lambda: block(2, null_target=0.3), "null_rate"),
        (lambda: block(2, router_noise_tau=1.0, router_noise_tau_end=2.0), "it falls"),
        (lambda: block(2, contract="sequence", backend="vmap"), "goes with loop"),
        (lambda: MoEBlock([nn.ReLU(), nn.ReLU()])(inputs(1, 2, 4)), "give input_dim"),
    ],
)
def test_what_cannot_go_together_is_refused_with_the_way_out(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("contract", ["pointwise", "sequence", "zeros"])
def test_experts_of_unequal_width_are_named(contract):
    moe = block([mlp(0), mlp(1, out=5)], k=2, contract=contract)
    with pytest.raises(ValueError, match=r"expert 0 \(Sequential\) gives \(8,\) for a token and expert 1 .* \(5,\)"):
        moe(inputs(2, 6, DIM))


class Named(nn.Module):
    """An MLP whose layers do not stand in a chain."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 12), nn.Linear(12, DIM)

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_all_violations_are_told_at_once():
    with pytest.raises(ValueError, match=r"(?s)noise_tau_end.*bias_rate|bias_rate.*noise_tau_end"):
        MoEConfig(
            aggregation="mean", router=MoERouterConfig(bias_rate=0.1, noise_tau=1.0, noise_tau_end=2.0, noise="gumbel")
        )
    with pytest.raises(ValueError, match=r"(?s)temperature.*proj_dim"):
        MoERouterConfig(temperature=0.0, proj_dim=0)


def test_arguments_and_shapes_of_a_forward_are_checked():
    moe = block(2)
    with pytest.raises(TypeError):
        moe(inputs(1, 3, DIM), None, None, 3)
    with pytest.raises(TypeError):
        moe(inputs(1, 3, DIM), position_ids=None)
    with pytest.raises(TypeError, match="router.name=hash"):
        moe(inputs(1, 3, DIM), token_ids=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="input_dim=8"):
        moe(inputs(1, 3, 5))
    with pytest.raises(ValueError, match="padding_mask"):
        moe(inputs(1, 3, DIM), padding_mask=torch.ones(1, 4))


def test_before_a_forward_there_is_nothing_to_read():
    moe = block(2)
    assert moe.last is None
    for name in ("routing_matrix", "batched_routing_matrix", "experts_masks", "batched_experts_masks", "backend_used"):
        with pytest.raises(RuntimeError, match="no forward yet"):
            getattr(moe, name)
    for name in ("experts_load", "abs_experts_load"):
        with pytest.raises(RuntimeError, match="no forward yet"):
            getattr(moe, name)()


def test_accessors_are_one_routing_in_several_shapes_without_graph():
    moe = block(3, k=2, null_experts=("zero",))
    moe(inputs(2, 5, DIM))
    whole = moe.batched_routing_matrix
    assert whole.shape == (2, 5, 4)
    assert torch.equal(moe.routing_matrix, whole.reshape(10, 4))
    assert torch.equal(moe.batched_experts_masks, whole.permute(2, 0, 1)[..., None])
    assert torch.equal(moe.experts_masks, whole.reshape(10, 4).T[..., None])
    assert not whole.requires_grad
    assert not moe.last.weights.requires_grad
    assert torch.equal(moe.abs_experts_load(), moe.experts_load().sum(1))
    assert int(moe.abs_experts_load().sum()) == 10 * 2


@pytest.mark.parametrize("name", ["top_k", "expert_choice", "soft", "round_robin"])
def test_padding_changes_nothing_for_the_others(name):
    losses = {"load_balance": 1.0, "z_loss": 0.1} if name in ("top_k", "expert_choice") else {}
    moe = block(3, router_name=name, router_losses=losses)
    x, mask = inputs(2, 8, DIM), torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :5] = True
    wanted = moe(x[:, :5])
    loads, loss = moe.abs_experts_load(), moe.aux_loss.item()
    y = moe(x, padding_mask=mask)
    torch.testing.assert_close(y[:, :5], wanted, atol=1e-6, rtol=1e-5)
    assert not y[:, 5:].any()
    assert torch.equal(moe.abs_experts_load(), loads)
    assert moe.aux_loss.item() == pytest.approx(loss, abs=1e-6)
    identity = block(3, router_name=name, capacity_dropped="identity")
    if name != "soft":
        assert torch.equal(identity(x, padding_mask=mask)[:, 5:], x[:, 5:])


def test_shared_experts_always_work():
    experts = mlps(4)
    moe, x = (
        MoEBlock(experts, config=MoEConfig(shared_experts=1, router=MoERouterConfig(noise=None))),
        inputs(2, 5, DIM),
    )
    assert len(moe.experts) == 3
    plain = MoEBlock(experts[:3], config=MoEConfig(router=MoERouterConfig(noise=None)))
    plain.router.weight.data = moe.router.weight.data
    torch.testing.assert_close(moe(x), plain(x) + experts[3](x), atol=1e-6, rtol=1e-5)


def test_expert_dropout_bars_experts_in_training_and_leaves_k():
    moe, x = block(6, k=2, expert_dropout=0.9), inputs(1, 200, DIM)
    torch.manual_seed(0)
    used = set()
    for _ in range(20):
        moe(x)
        here = moe.abs_experts_load() > 0
        assert 2 <= int(here.sum()) < 6
        assert (moe.last.expert_ids >= 0).all()
        used |= set(here.nonzero().flatten().tolist())
    assert used == set(range(6))
    moe.eval()(x)
    assert int((moe.abs_experts_load() > 0).sum()) == 6


@pytest.mark.parametrize("noise", ["learned", "normal", "gumbel", "simple", "jitter"])
def test_eval_is_deterministic_and_the_same_in_every_batch(noise):
    moe, x = block(5, k=2, router_noise=noise), inputs(6, 4, DIM)
    moe(x)
    moe.eval()
    whole = moe(x)
    assert torch.equal(whole, moe(x))
    for row in range(6):
        torch.testing.assert_close(moe(x[row : row + 1]), whole[row : row + 1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda moe: pickle.loads(pickle.dumps(moe))])
def test_copies_after_a_forward_of_training_leave_out_what_it_left(how):
    moe = block(3, k=2, router_noise="gumbel", router_noise_steps=4, router_losses={"balance_entropy": 1.0})
    moe.observers.append(lambda *_: None)
    moe(inputs(2, 5, DIM))
    twin = how(moe)
    assert twin.last is None
    assert twin.observers == []
    assert twin.aux_loss.item() == 0
    assert moe.aux_loss.requires_grad
    assert torch.equal(twin.eval()(inputs(2, 5, DIM)), moe.eval()(inputs(2, 5, DIM)))


def test_a_saved_state_computes_the_same():
    options = {"k": 2, "router_score": "sigmoid", "router_bias_rate": 0.1, "null_experts": ("constant",)}
    for more in (options, {"router_noise": "gumbel", "router_noise_tau_end": 0.1, "router_noise_steps": 5}):
        moe = block(3, **more)
        for _ in range(3):
            moe(inputs(2, 5, DIM))
        if "router_bias_rate" in more:
            moe.router.bias.copy_(inputs(3))
            moe.nulls.constant_0.data = inputs(DIM)
        state = moe.state_dict()
        assert {name for name in state if name.startswith("experts.")} == {
            f"experts.{e}.{name}" for e in range(3) for name in mlp(0).state_dict()
        }
        other = block(3, seed=1, **more)
        other.load_state_dict(state)
        assert torch.equal(other.eval()(inputs(2, 5, DIM)), moe.eval()(inputs(2, 5, DIM)))


def test_a_state_dict_of_moefys_block_is_read():
    moe = block([nn.Linear(DIM, 4) for _ in range(3)])
    theirs = {f"experts.{i}.{n}": t for i, e in enumerate(moe.experts) for n, t in e.state_dict().items()}
    theirs["router.expert_embs"] = inputs(DIM, 3)
    moe.load_state_dict(MoEBlock.convert_moefy_state_dict(theirs))
    assert torch.equal(moe.router.weight, inputs(DIM, 3).T)


def test_listeners_get_every_routing_once_without_graph():
    moe, heard = block(3, k=2), []
    moe.observers.append(lambda *given: heard.append(given))
    mask = torch.ones(2, 5, dtype=torch.bool)
    moe(inputs(2, 5, DIM))
    mask[1, 3:] = False
    moe(inputs(2, 5, DIM), padding_mask=mask)
    assert [given[0] for given in heard] == [moe, moe]
    assert heard[0][2].all()
    assert torch.equal(heard[1][2], mask)
    assert not heard[0][1].weights.requires_grad


def test_a_configuration_is_taken_whole():
    config = MoEConfig(k=2, capacity=CapacityConfig(factor=1.0), router=MoERouterConfig(noise=None))
    moe = MoEBlock(mlps(3), config=config, layer_id="here")
    assert moe.layer_id == "here"
    assert moe.config.k == 2
