"""Static weights of experts and backbone as a router: first values, sums, sets of sites, settings that cannot act."""

import math

import pytest
import torch
from router_cases import frame, named

from mole.routers import MixtureShape
from mole.routers.multi_adapter import MultiAdapterConfig, MultiAdapterRouter, is_norm_site, sub_layers
from mole.routing import Routing

NAMES = ("rte", "mrpc", "cola")
BERT = (
    "bert.embeddings.LayerNorm",
    *(f"bert.encoder.layer.{n}.{end}" for n in range(3) for end in ("attention.output", "output")),
)
ENDS = ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
LLAMA = (*(f"model.layers.{n}.{end}" for n in range(2) for end in ENDS), "model.norm")


def router(sites=BERT, names=NAMES, **fields):
    return MultiAdapterRouter(MultiAdapterConfig(**fields), named(names, sites)).eval()


def routings(made):
    found = made(None, frame())
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("mode", ["base", "flex", "base_ft", "full_ft"])
def test_softmax_weights_start_uniform_over_the_branches(mode):
    (found,) = routings(router(mode=mode))
    branches = 3 if mode == "flex" else 4
    torch.testing.assert_close(found.weights, torch.full((1, 1, 3), 1 / branches))
    assert found.base.item() == pytest.approx(0.0 if mode == "flex" else 0.25, abs=1e-7)


def test_sigmoid_weights_start_at_one_half():
    (found,) = routings(router(normalise="sigmoid"))
    assert found.weights.tolist() == [[[0.5] * 3]]
    assert found.base.item() == 0.5


@pytest.mark.parametrize(("init", "start"), [(None, 0.25), (1.0, 1.0), (0.1, 0.1)])
def test_plain_weights_start_at_their_share_or_at_init(init, start):
    (found,) = routings(router(normalise="none", init=init))
    torch.testing.assert_close(found.weights, torch.full((1, 1, 3), start))
    assert found.base.item() == pytest.approx(start)


@pytest.mark.parametrize("mode", ["base", "flex"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_trained_softmax_weights_sum_to_one(mode, temperature):
    made = router(mode=mode, temperature=temperature, num_groups=3)
    torch.nn.init.normal_(made.theta, std=3.0)
    for found in routings(made):
        assert (found.weights > 0).all()
        torch.testing.assert_close(found.weights.sum() + found.base.sum(), torch.tensor(1.0))
    logits = torch.cat([made.theta, made.base], 1) if mode == "base" else made.theta
    want = torch.softmax(logits.double() / temperature, -1)[:, :3]
    torch.testing.assert_close(made.weights().double(), want, rtol=0, atol=1e-6)


def test_trained_sigmoid_weights_lie_between_0_and_1():
    made = router(normalise="sigmoid", temperature=2.0)
    torch.nn.init.normal_(made.theta, std=3.0)
    torch.testing.assert_close(made.weights(), torch.sigmoid(made.theta / 2.0))
    assert ((made.weights() > 0) & (made.weights() < 1)).all()


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({}, [7]),
        ({"num_groups": 1}, [7]),
        ({"num_groups": 2}, [4, 3]),
        ({"num_groups": 6}, [2, 1, 1, 1, 1, 1]),
        ({"num_groups": None, "site": "block"}, [3, 2, 2]),
        ({"num_groups": None, "site": "module"}, [2, 1, 1, 1, 1, 1]),
        ({"num_groups": 2, "site": "block"}, [3, 4]),
    ],
)
def test_sets_are_runs_of_sub_layers_and_the_first_norm_is_of_the_first_set(fields, sizes):
    made = router(**fields)
    assert [len(sites) for sites in made.groups.values()] == sizes
    assert list(made.groups) == [f"set_{n:02d}" for n in range(len(sizes))]
    assert [site for sites in made.groups.values() for site in sites] == list(range(7))
    assert made.theta.shape == (len(sizes), 3)


@pytest.mark.parametrize("fields", [{"num_groups": 4}, {"num_groups": None, "site": "block"}, {"num_groups": None}])
def test_every_set_has_a_parameter_of_its_own_that_gradients_reach(fields):
    made = router(**fields)
    torch.nn.init.normal_(made.theta)
    found = routings(made)
    assert len(found) == len(BERT)
    for number, sites in enumerate(made.groups.values()):
        made.zero_grad()
        found = routings(made)
        sum((found[site].weights * torch.arange(3.0)).sum() for site in sites).backward()
        reached = made.theta.grad.abs().sum(1) > 0
        assert reached.tolist() == [row == number for row in range(len(made.groups))]
    assert len({tuple(row) for row in made.theta.tolist()}) == len(made.groups)


def test_norms_belong_to_their_block_and_the_last_to_the_last():
    made = router(LLAMA, num_groups=None, site="block")
    assert [[LLAMA[i] for i in sites] for sites in made.groups.values()] == [list(LLAMA[:4]), list(LLAMA[4:])]
    made = router(LLAMA, num_groups=None, site="module")
    assert [len(sites) for sites in made.groups.values()] == [1, 3, 1, 4]


def test_norms_before_the_sub_layers_of_a_block_go_with_its_first():
    sites = tuple(f"transformer.h.{n}.{end}" for n in range(2) for end in ("ln_1", "attn.c_proj", "ln_2", "mlp.c_proj"))
    made = router(sites, num_groups=None, site="module")
    assert list(made.groups.values()) == [(0, 1, 2), (3,), (4, 5, 6), (7,)]


def test_a_whole_sub_layer_and_the_module_that_ends_it_share_their_weights():
    sites = ("model.layers.0.mlp", "model.layers.0.mlp.down_proj", "model.layers.1.mlp")
    assert sub_layers(sites) == [sites[0], sites[2]]
    assert list(router(sites, num_groups=None).groups.values()) == [(0, 1), (2,)]
    with pytest.raises(ValueError, match="router.num_groups=3 with 2 modules"):
        router(sites, num_groups=3)


def test_a_norm_that_stands_for_the_sub_layer_that_it_closes_is_one():
    ends = ("sa_layer_norm", "output_layer_norm")
    sites = ("embeddings.LayerNorm", *(f"transformer.layer.{n}.{end}" for n in range(2) for end in ends))
    assert sub_layers(sites, sites[1:]) == list(sites[1:])
    given = ("a", "b")
    shape = MixtureShape(given, ((), ()), sites=sites, hidden_size=8, closing=sites[1:])
    made = MultiAdapterRouter(MultiAdapterConfig(num_groups=None, site="module"), shape)
    assert list(made.groups.values()) == [(0, 1), (2,), (3,), (4,)]
    made = MultiAdapterRouter(MultiAdapterConfig(num_groups=None, site="block"), shape)
    assert list(made.groups.values()) == [(0, 1, 2), (3, 4)]


def test_norms_alone_are_sub_layers_themselves():
    assert is_norm_site("model.norm")
    assert is_norm_site("transformer.h.0.ln_1")
    assert not is_norm_site("bert.encoder.layer.0.output")
    assert sub_layers(("model.norm", "model.layers.0.input_layernorm")) == [
        "model.norm",
        "model.layers.0.input_layernorm",
    ]


def test_weights_are_told_by_set_and_branch_and_those_left_out_are_not():
    made = router(exclude=("mrpc",), num_groups=2)
    assert made.weights_by_group() == {
        name: {"rte": pytest.approx(1 / 3), "cola": pytest.approx(1 / 3), "base": pytest.approx(1 / 3)}
        for name in ("set_00", "set_01")
    }
    assert routings(made)[0].weights[0, 0, 1] == 0


def test_an_empty_list_of_experts_to_leave_out_leaves_none_out():
    assert list(router(exclude=()).weights_by_group()["set_00"]) == [*NAMES, "base"]


def test_init_expert_starts_near_that_expert():
    (found,) = routings(router(init_expert="mrpc"))
    assert found.weights[0, 0, 1] > 0.9


def test_the_routing_of_all_sites_is_one_where_they_share_it():
    assert isinstance(router()(None, frame()), Routing)
    found = routings(router(num_groups=2))
    assert found[0] is found[3]
    assert found[0] is not found[6]


@pytest.mark.parametrize(("experts", "mode", "others"), [(1, "base", 1), (2, "base", 2), (3, "flex", 2)])
def test_the_highest_weight_is_the_bound_of_adam(experts, mode, others):
    made = router(names=NAMES[:experts], mode=mode, temperature=2.0)
    want = 1 / (1 + others * math.exp(-2 * 0.7 / 2.0))
    assert made.highest_weight(0.7) == pytest.approx(want)
    assert router(normalise="sigmoid").highest_weight(0.7) is None


def test_no_softmax_weight_passes_that_bound_under_adam():
    made = router(names=("rte", "mrpc"))
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        (-made.weights()[0, 0]).backward()
        optimizer.step()
    assert 0.5 < made.weights()[0, 0] < made.highest_weight(40 * 0.05) + 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_groups": 0}, "router.num_groups=0: a number of sets from 1 on, or null"),
        ({"num_groups": -1}, "router.num_groups=-1.*a set per block is written num_groups=null router.site=block"),
        ({"include_base": False}, "router.include_base=false contradicts router.mode=base: leave it null"),
        ({"include_flex": True}, "router.include_flex=true contradicts router.mode=base"),
        ({"mode": "flex", "include_base": True}, "router.include_base=true contradicts router.mode=flex"),
        ({"mode": "flex", "include_flex": False}, "router.include_flex=false contradicts router.mode=flex"),
        ({"mode": "weights"}, "mode"),
        ({"combine": "parameters"}, "set router.combine=outputs"),
        ({"temperature": 0.0}, "temperature"),
        ({"lr": 0.0}, "lr"),
        ({"flex_size": 0}, "flex_size"),
        ({"log_every_steps": 0}, "log_every_steps"),
        ({"normalise": "max"}, "normalise"),
        ({"init": 1.0}, "router.init is the first weight with router.normalise=none"),
        ({"init_expert": "rte", "normalise": "sigmoid"}, "router.init_expert needs router.normalise=softmax"),
        ({"init_expert": "rte", "exclude": ("rte",)}, "router.init_expert=rte is in router.exclude"),
        ({"temperature": 2.0, "normalise": "none"}, "router.temperature cannot act with router.normalise=none"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        MultiAdapterConfig(**fields)


@pytest.mark.parametrize(
    ("mode", "base", "flex"),
    [("base", True, False), ("flex", False, True), ("base_ft", True, False), ("full_ft", True, False)],
)
def test_flags_follow_the_mode_and_may_repeat_it(mode, base, flex):
    config = MultiAdapterConfig(mode=mode, include_base=base, include_flex=flex)
    assert (config.has_base, config.has_flex) == (base, flex)


def test_no_single_expert_does_what_branches_do():
    with pytest.raises(ValueError, match="no single expert does the same"):
        router().mergeable()
