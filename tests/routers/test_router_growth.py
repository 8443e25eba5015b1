"""Every registered router keeps what it learned when experts come and go, without a line for any single one."""

import dataclasses

import pytest
import torch
from test_router_contract import DIM, SHAPE, VARIANTS, build, config_of, hidden, lora, route

from mole.routers import MixtureShape

GROWN = MixtureShape(("d", "c", "a", "b"), (("five",), *(SHAPE.expert_tasks[i] for i in (2, 0, 1))), SHAPE.sites, 8)


def over(variant, shape, old, seed):
    """A router of the same config over the experts of `shape`, with what `old` knows; untrained but for that."""
    torch.manual_seed(seed)
    options = {"input_dim": DIM, "sites": SHAPE.sites[:1]} if variant.implementation.scope == "layer" else {}
    if "outputs" in variant.implementation.needs:
        options["output_dim"] = DIM
    router = variant.implementation(config_of(variant), shape, **options).eval()
    if "experts" in router.needs:
        router.take_experts([{i: lora("abcd".index(name)) for i, name in enumerate(shape.expert_names)}])
    router.carry(old)
    return router


def trained(variant):
    """A router whose every parameter has left its start."""
    router = build(variant)
    generator = torch.Generator().manual_seed(21)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return router


@pytest.mark.parametrize("variant", VARIANTS)
def test_adding_an_expert_and_removing_it_again_changes_nothing(variant):
    first = trained(variant)
    grown = over(variant, GROWN, first, seed=1)
    back = over(variant, SHAPE, grown, seed=2)
    for one, other in zip(route(first, hidden()), route(back, hidden()), strict=True):
        assert torch.equal(one.dense(3), other.dense(3))
        if one.logits is not None and other.logits is not None:
            assert torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_expert_leaves_the_scores_of_the_others_bit_equal(variant):
    first = trained(variant)
    for one, other in zip(route(first, hidden()), route(over(variant, GROWN, first, seed=1), hidden()), strict=True):
        if one.logits is None or other.logits is None or other.logits.shape[-1] != 4:
            continue  # weights without scores: what they become is the router's own rule
        torch.testing.assert_close(other.logits[..., [2, 3, 1]], one.logits, rtol=1e-4, atol=1e-6)


def test_scores_of_all_layers_follow_their_sites():
    variant = next(v.values[0] for v in VARIANTS if v.id == "xlora")
    config = variant.config(layerwise=True, depth=2, size=4, dropout=0.0)
    torch.manual_seed(0)
    old = variant.implementation(config, SHAPE).eval()
    shape = dataclasses.replace(GROWN, sites=("z", "w", "new"))
    new = variant.implementation(config, shape).eval()
    new.carry(old)
    before, after = route(old, hidden()), route(new, hidden())
    torch.testing.assert_close(after[0].logits[..., [2, 3, 1]], before[3].logits, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after[1].logits[..., [2, 3, 1]], before[0].logits, rtol=1e-4, atol=1e-6)
