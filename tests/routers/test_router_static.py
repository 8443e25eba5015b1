"""Learned static weights: where they start, who shares them, what the backbone gets."""

import math

import pytest
import torch
from pydantic import ValidationError
from router_cases import frame, named, shape

from mole.routers import StaticConfig, StaticRouter
from mole.routers.static import groups_of

SITES = ("embed", *(f"layers.{i}.{part}" for i in range(4) for part in ("q", "up")), "head")


def static(num_experts=3, sites=SITES, **options) -> StaticRouter:
    return StaticRouter(StaticConfig(**options), shape(num_experts, sites))


def routings(router):
    routed = router(None, frame())
    return list(routed) if isinstance(routed, tuple) else [routed] * len(router.sites)


@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({}, 1 / 4),
        ({"include_base": False}, 1 / 3),
        ({"normalise": "sigmoid"}, 1 / 2),
        ({"normalise": "none"}, 1 / 3),
        ({"normalise": "none", "init": 0.7}, 0.7),
    ],
)
def test_weights_start_equal(options, each):
    weights = routings(static(**options))[0].weights
    assert weights.shape == (1, 1, 3)
    assert weights[0, 0].tolist() == pytest.approx([each] * 3)


def test_excluded_experts_get_nothing_and_the_others_share():
    router = static(exclude=("e1",), include_base=False)
    assert routings(router)[0].weights[0, 0].tolist() == [0.5, 0.0, 0.5]
    assert routings(static(exclude=("e1",), normalise="none"))[0].weights[0, 0].tolist() == [0.5, 0.0, 0.5]


def test_the_backbone_keeps_what_the_softmax_does_not_spend():
    router = static(temperature=0.5)
    router.theta.data = torch.tensor([[0.1, -0.4, 0.7]])
    router.base.data = torch.tensor([[0.3]])
    want = torch.softmax(torch.tensor([0.1, -0.4, 0.7, 0.3]) / 0.5, -1)
    torch.testing.assert_close(routings(router)[0].weights[0, 0], want[:3])
    (found,) = router.weights_by_group().values()
    assert found == pytest.approx(dict(zip(("e0", "e1", "e2", "base"), want.tolist(), strict=True)))


def test_a_head_start_is_four_in_the_logits():
    weights = routings(static(init_expert="e2", include_base=False))[0].weights[0, 0]
    assert float(weights[2].detach()) == pytest.approx(math.exp(4) / (math.exp(4) + 2))


@pytest.mark.parametrize(
    ("num_groups", "site", "sizes"),
    [
        (1, "block", [10]),
        (2, "block", [5, 5]),
        (3, "block", [3, 4, 3]),
        (4, "module", [2, 3, 2, 3]),
        (None, "block", [1, 2, 2, 2, 2, 1]),
        (None, "module", [1] * 10),
    ],
)
def test_groups_are_runs_of_neighbours_that_cut_no_block(num_groups, site, sizes):
    groups = groups_of(SITES, num_groups, site)
    assert [len(members) for members in groups.values()] == sizes
    assert [index for members in groups.values() for index in members] == list(range(10))
    router = static(num_groups=num_groups, site=site)
    router.theta.data = torch.randn(router.theta.shape, generator=torch.Generator().manual_seed(0))
    found = routings(router)
    assert len({id(r) for r in found}) == len(sizes)
    assert len({tuple(r.weights[0, 0].tolist()) for r in found}) == len(sizes)
    for row, members in enumerate(groups.values()):
        logits = torch.cat([router.theta[row], router.base[row]])
        for index in members:
            torch.testing.assert_close(found[index].weights[0, 0], torch.softmax(logits, -1)[:3])


def test_encoder_and_decoder_blocks_of_one_number_are_two_blocks():
    assert list(groups_of(["encoder.block.0.q", "decoder.block.0.q"], None, "block")) == [
        "encoder.block.0",
        "decoder.block.0",
    ]


def test_mergeable_weights_are_those_spent():
    one, many = static(), static(num_groups=None, site="module", expert_dropout=0.5).train()
    assert torch.equal(one.mergeable(), routings(one)[0].weights[0, 0])
    many.theta.data.normal_()
    merged = many.mergeable()
    many.eval()
    assert all(torch.equal(w, r.weights[0, 0]) for w, r in zip(merged, routings(many), strict=True))
    assert not any(w.requires_grad for w in merged)


@pytest.mark.parametrize("normalise", ["softmax", "sigmoid", "none"])
def test_dropped_experts_are_left_out_everywhere_in_training_only(normalise):
    options = {"normalise": normalise, "num_groups": None, "expert_dropout": 0.5}
    router = static(8, **options)
    assert (router.weights() > 0).all()
    router.train()
    torch.manual_seed(1)
    spent = torch.stack([r.weights[0, 0] for r in routings(router)])
    gone = spent == 0
    assert gone.any()
    assert not gone.all()
    assert torch.equal(gone, gone[:1].expand_as(gone))


def test_other_experts_leave_the_weights_of_those_that_stay_as_they_are():
    config = StaticConfig(num_groups=None, site="module", normalise="sigmoid")
    old, new = (StaticRouter(config, named(names, SITES)) for names in ("abc", "dcxa"))
    old.theta.data.normal_()
    new.carry(old)
    assert torch.equal(new.weights()[:, [3, 1]], old.weights()[:, [0, 2]])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init_expert": "a", "normalise": "none"}, "needs router.normalise=softmax"),
        ({"init": 0.5}, "router.init is the first weight"),
        ({"include_base": True, "normalise": "sigmoid"}, "cannot act"),
        ({"temperature": 2.0, "normalise": "none"}, "cannot act"),
        ({"init_expert": "a", "exclude": ("a",)}, "is in router.exclude"),
    ],
)
def test_settings_that_cannot_act_together_are_refused(options, says):
    with pytest.raises(ValidationError, match=says):
        StaticConfig(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"exclude": ("",)}, "unknown expert ''"),
        ({"exclude": ("e0", "e1", "e2")}, "every expert"),
        ({"init_expert": "e9"}, "router.init_expert: unknown expert 'e9'"),
        ({"num_groups": 7}, "7 with 6 blocks"),
    ],
)
def test_names_and_numbers_that_the_mixture_does_not_have_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        static(**options)
