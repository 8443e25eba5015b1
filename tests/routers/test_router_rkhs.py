"""RKHS scores against the formula; a new expert is a new row."""

import pytest
import torch
from router_cases import DIM, build, frame, inputs, named, shape

from mole.routers import RkhsConfig, RkhsRouter


@pytest.mark.parametrize(("k", "normalise"), [(None, True), (2, True), (2, False), (1, False)])
def test_weights_are_those_of_inner_products_in_the_common_space(k, normalise):
    config = RkhsConfig(rkhs_dim=10, emb_dim=4, top_k=k, norm_topk=normalise, temperature=0.3)
    router = build(RkhsRouter, config, shape(4)).double()
    router.keys.data.normal_()
    x = inputs(2, 5, DIM, dtype=torch.float64)
    tokens = x @ router.of_tokens.weight.T + router.of_tokens.bias
    experts = router.keys @ router.of_experts.weight.T + router.of_experts.bias
    p = torch.softmax(torch.einsum("btd,ed->bte", tokens, experts) / 0.3, -1)
    if k is not None:
        p = torch.where(p >= p.topk(k).values[..., -1:], p, 0.0)
        p = p / p.sum(-1, keepdim=True) if normalise else p
    torch.testing.assert_close(router(x, frame()).dense(4), p)


def test_keys_start_small_and_uniform():
    keys = build(RkhsRouter, RkhsConfig(), shape(200)).keys
    assert 0.0199 < float(keys.detach().abs().max()) <= 0.02
    assert float(keys.detach().std()) == pytest.approx(0.02 / 3**0.5, rel=0.02)


def test_other_experts_leave_the_scores_of_those_that_stay_as_they_are():
    old, new = (build(RkhsRouter, RkhsConfig(), named(n), seed) for seed, n in enumerate(("abc", "dcxa")))
    new.carry(old)
    x = inputs(2, 5, DIM)
    torch.testing.assert_close(new(x, frame()).logits[..., [3, 1]], old(x, frame()).logits[..., [0, 2]])


def test_more_experts_than_there_are_is_refused():
    with pytest.raises(ValueError, match="router.top_k=5 with 4 experts"):
        build(RkhsRouter, RkhsConfig(top_k=5), shape(4))


def test_training_brings_no_token_to_the_common_space_and_gives_the_same_scores_and_gradients():
    router, kept = build(RkhsRouter, RkhsConfig(rkhs_dim=700, emb_dim=4), shape(3)).double(), []
    x = inputs(2, 50, DIM, dtype=torch.float64)
    found = {}
    for training in (False, True):
        kept.clear()
        router.train(training).zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            logits = router(x, frame()).logits
        logits.square().sum().backward()
        found[training] = (logits.detach(), *(p.grad.clone() for p in router.parameters()))
        assert (max(kept) >= 100 * 700) is not training
    for one, other in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(one, other)
