"""Product keys against a search through all experts; the grid, its empty places and its growth."""

import pytest
import torch
from pydantic import ValidationError
from router_cases import DIM, build, frame, inputs, named, shape

from mole.routers import ProductKeyConfig, ProductKeyRouter
from mole.routers.product_key import candidates


def product_key(num_experts, seed=0, **options) -> ProductKeyRouter:
    config = ProductKeyConfig(**{"num_heads": 3, "key_dim": 4, **options})
    return build(ProductKeyRouter, config, shape(num_experts), seed).double()


def all_scores(router, x):
    """s¹_i + s²_j of every expert, one head and one expert after the other, float64 [B, T, H, E]."""
    config = router.config
    q = (x @ router.query.weight.T).view(*x.shape[:2], config.num_heads, 2, config.key_dim)
    if config.query_norm == "layer":
        q = (q - q.mean(-1, keepdim=True)) / (q.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    out = []
    for head in range(config.num_heads):
        first, second = (q[:, :, head, half] @ router.sub_keys[half, head].T for half in (0, 1))
        out.append(torch.stack([first[..., s // router.n] + second[..., s % router.n] for s in router.slots], -1))
    return torch.stack(out, 2) / config.temperature


@pytest.mark.parametrize("num_experts", [2, 3, 7, 9, 10, 17, 100])
@pytest.mark.parametrize("k", [2, 5, None])
@pytest.mark.parametrize("query_norm", ["layer", "none"])
def test_the_experts_found_are_the_best_of_all(num_experts, k, query_norm):
    if k is not None and k > num_experts:
        return
    router, x = (
        product_key(num_experts, top_k=k, query_norm=query_norm, temperature=0.7),
        inputs(2, 7, DIM, dtype=torch.float64),
    )
    brute = all_scores(router, x).sort(dim=-1, descending=True, stable=True)
    kept = k or min(16, num_experts)
    routing = router(x, frame())
    assert torch.equal(routing.expert_ids.view(2, 7, 3, kept), brute.indices[..., :kept])
    want = torch.softmax(brute.values[..., :kept], -1) / 3
    torch.testing.assert_close(routing.weights.view(2, 7, 3, kept), want)


def test_equal_scores_go_to_the_lower_ids():
    router = product_key(10, top_k=4)
    router.sub_keys.data.zero_()
    ids = router(inputs(1, 2, DIM, dtype=torch.float64), frame()).expert_ids.view(1, 2, 3, 4)
    assert torch.equal(ids, torch.arange(4).expand_as(ids))


def test_every_expert_can_be_found():
    router = product_key(100, top_k=4, num_heads=8)
    ids = router(inputs(1, 3000, DIM, dtype=torch.float64), frame()).expert_ids
    assert ids.unique().tolist() == list(range(100))


def test_few_pairs_are_looked_at():
    assert len(candidates(16, 100)) == 50  # Σ_a ⌊16 / a⌋, not 256 and not 10,000
    assert len(product_key(10000, top_k=16, num_heads=1).pairs) == 50


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_other_activations_are_the_scores_own(activation):
    router, x = product_key(9, top_k=3, activation=activation), inputs(2, 4, DIM, dtype=torch.float64)
    best = all_scores(router, x).topk(3).values
    want = (best.clamp_min(0) if activation == "relu" else torch.sigmoid(best)) / 3
    torch.testing.assert_close(router(x, frame()).weights.view(2, 4, 3, 3), want)


def test_the_heads_together_spend_a_weight_of_one():
    weights = product_key(10)(inputs(2, 4, DIM, dtype=torch.float64), frame()).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, dtype=torch.float64))


def test_logits_are_the_mean_of_the_heads_and_made_only_where_somebody_looks():
    router, x = product_key(10, top_k=4), inputs(2, 4, DIM, dtype=torch.float64)
    assert router(x, frame()).logits is None
    logits, scores = router(x, frame(recording=True)).logits, all_scores(router, x)
    torch.testing.assert_close(torch.softmax(logits, -1), torch.softmax(scores, -1).mean(2))
    torch.testing.assert_close(logits.logsumexp(-1), scores.logsumexp(-1).mean(2))


def test_batch_norm_sees_valid_tokens_only_and_keeps_what_it_saw():
    router, x = product_key(9, query_norm="batch").train(), inputs(2, 50, DIM, dtype=torch.float64)
    mask = (torch.arange(50) < torch.tensor([[50], [20]])).long()
    one = frame(attention_mask=mask)
    torch.manual_seed(0)
    first = router(x, one).weights
    queries = router.query(x)[mask.bool()]
    torch.testing.assert_close(router.norm.mean, 0.1 * queries.mean(0).detach())
    torch.testing.assert_close(router.norm.variance, 0.9 + 0.1 * queries.var(0, unbiased=False).detach())
    assert torch.equal(router(x, one).weights, first)  # computed again: what it saw counts once
    torch.testing.assert_close(router.norm.mean, 0.1 * queries.mean(0).detach())
    changed = torch.where(mask[..., None].bool(), x, 100.0)
    torch.testing.assert_close(router(changed, frame(attention_mask=mask)).weights[mask.bool()], first[mask.bool()])
    router.eval()
    torch.testing.assert_close(router(x[:1], frame()).weights, router(x, frame()).weights[:1])


def test_dropped_experts_are_not_spent_and_no_head_stays_empty():
    router = product_key(9, top_k=2, expert_dropout=0.7).train()
    weights = router(inputs(200, 2, DIM, dtype=torch.float64), frame()).weights
    assert (weights == 0).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(200, 2, dtype=torch.float64))


def logits_of(router, names, x):
    columns = [router.shape.expert_names.index(name) for name in names]
    return router(x, frame(recording=True)).logits[..., columns], all_scores(router, x)[..., columns]


@pytest.mark.parametrize(
    ("before", "after"),
    [("abcd", "abcde"), ("abcdefghi", "abcdefghij"), ("abcdefghij", "xjbdfhy"), ("abcdefghij", "bj"), ("abc", "cab")],
)
def test_experts_that_stay_keep_their_scores_when_others_come_and_go(before, after):
    config = ProductKeyConfig(num_heads=2, key_dim=4, query_norm="batch")
    old, new = (build(ProductKeyRouter, config, named(n), seed).double() for seed, n in enumerate((before, after)))
    old.norm.mean.normal_()
    new.carry(old)
    x, both = inputs(2, 4, DIM, dtype=torch.float64), sorted(set(before) & set(after))
    old.config = new.config = ProductKeyConfig(num_heads=2, key_dim=4, query_norm="none")  # for `all_scores`
    torch.testing.assert_close(logits_of(new, both, x)[1], logits_of(old, both, x)[1])
    assert len(set(new.slots.tolist())) == len(after)
    best = all_scores(new, x).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(new(x, frame()).expert_ids.view(2, 4, 2, -1), best[..., : new.k])


def test_the_grid_stays_as_large_as_the_places_of_those_that_stay_need():
    before, after = "abcdefghijklmnop", "afkp"  # the diagonal of 4 × 4
    config = ProductKeyConfig(num_heads=1, key_dim=2)
    old = build(ProductKeyRouter, config, named(before)).double()
    new, again = (build(ProductKeyRouter, config, named(after)).double() for _ in range(2))
    new.carry(old)
    x = inputs(1, 3, DIM, dtype=torch.float64)
    torch.testing.assert_close(all_scores(new, x), all_scores(old, x)[..., [0, 5, 10, 15]])
    assert new.sub_keys.shape[2] == 4
    for name, tensor in new.state_dict(keep_vars=True).items():  # as a saved mixture is read
        again.state_dict(keep_vars=True)[name].data = tensor.detach().clone()
    again.check_state()
    for router in (new, again):
        ids = router(x, frame()).expert_ids.view(1, 3, 1, 4)
        assert torch.equal(ids, all_scores(new, x).sort(dim=-1, descending=True).indices)


@pytest.mark.parametrize(
    ("slots", "keys", "says"),
    [
        ([0, 1, 2, 2], (2, 3, 2, 4), "3 slots"),
        ([0, 1, 2, 4], (2, 3, 2, 4), "outside"),
        ([0, 1, 2, 3], (2, 3, 2, 5), "no"),
    ],
)
def test_a_damaged_grid_is_refused(slots, keys, says):
    router = product_key(4)
    router.slots.data, router.sub_keys.data = torch.tensor(slots), torch.zeros(keys)
    with pytest.raises(ValueError, match=says):
        router.check_state()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="set it to 4 or more"):
        product_key(10, num_keys=3)
    with pytest.raises(ValueError, match="router.top_k=5 with 4 experts"):
        product_key(4, top_k=5)
    with pytest.raises(ValidationError, match="no gradient"):
        ProductKeyConfig(top_k=1)
