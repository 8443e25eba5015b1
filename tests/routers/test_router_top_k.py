"""Top-k scores, selection and noise against the formulas written out; its growth."""

import math

import pytest
import torch
from pydantic import ValidationError
from router_cases import DIM, build, frame, inputs, named, shape

from mole.routers import TopKConfig, TopKRouter


def top_k(seed=0, num_experts=3, **options) -> TopKRouter:
    return build(TopKRouter, TopKConfig(**options), shape(num_experts), seed)


def by_hand(z, k, normalise, score="softmax"):
    """Per token, in float64: the weights over all experts."""
    p = torch.softmax(z, -1) if score == "softmax" else torch.sigmoid(z)
    out = torch.zeros_like(p)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in p.shape[:-1])):
        row = p[tuple(index)]
        best = sorted(range(len(row)), key=lambda e: (-float(row[e]), e))[: k or len(row)]
        for e in best:
            out[tuple(index)][e] = row[e] / (sum(row[b] for b in best) if normalise else 1)
    return out


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 3, None])
@pytest.mark.parametrize("normalise", [True, False])
def test_weights_are_those_of_the_formula(score, k, normalise):
    if k == 1 and normalise:
        return
    router = top_k(score=score, top_k=k, norm_topk=normalise, temperature=0.4, bias=True, init_std=1.0)
    router.score.bias.data.normal_()
    router.double()
    x = inputs(2, 4, DIM, dtype=torch.float64)
    z = (x @ router.score.weight.T + router.score.bias) / 0.4
    routing = router(x, frame())
    torch.testing.assert_close(routing.dense(3), by_hand(z.detach(), k, normalise, score), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routing.logits, z)


def test_cosine_scores_are_scaled_cosines_and_do_not_see_the_size_of_the_input():
    router, x = top_k(score="cosine", proj_dim=4, top_k=None, temperature=0.5), inputs(2, 4, DIM)
    router.log_scale.data.fill_(math.log(7.0))
    low = x.double() @ router.project.weight.double().T
    cosines = torch.nn.functional.cosine_similarity(low[..., None, :], router.centroids.double(), dim=-1)
    want = torch.softmax(cosines * 7 / 0.5, -1)
    torch.testing.assert_close(router(x, frame()).weights.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(router(30 * x, frame()).weights.double(), want, rtol=1e-5, atol=1e-6)


def test_the_scale_of_cosines_stops_at_a_hundred():
    router, x = top_k(score="cosine", proj_dim=4, top_k=None), inputs(1, 3, DIM)
    router.log_scale.data.fill_(50.0)
    assert router(x, frame()).logits.abs().max() <= 100.0 + 1e-3


@pytest.mark.parametrize("noise", ["normal", "learned", "jitter", "gumbel"])
def test_noise_acts_in_training_only(noise):
    router, plain, x = top_k(noise=noise), top_k(), inputs(2, 4, DIM)
    plain.score.load_state_dict(router.score.state_dict())
    assert torch.equal(router(x, frame()).dense(3), plain(x, frame()).dense(3))
    router.train()
    torch.manual_seed(1)
    first = router(x, frame()).logits
    assert not torch.equal(first, plain(x, frame()).logits)
    torch.manual_seed(2)
    assert not torch.equal(first, router(x, frame()).logits)


def test_normal_noise_is_a_share_of_one_expert():
    router, x = top_k(noise="normal").train(), inputs(4, 5000, DIM)
    noise = (router(x, frame()).logits - router.scores(x)).detach()
    assert float(noise.std()) == pytest.approx(1 / 3, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(("noise", "size"), [("normal", 1 / 3), ("learned", math.log(2))])
def test_noise_is_added_to_z_before_the_temperature_divides_it(noise, size):
    router, x = top_k(noise=noise, temperature=4.0).train(), inputs(4, 5000, DIM)
    added = (router(x, frame()).logits - router.scores(x)).detach()
    assert float(added.std()) == pytest.approx(size / 4, rel=0.02)


def test_learned_noise_starts_with_weights_of_zero_and_grows_with_them():
    router, x = top_k(noise="learned").train(), inputs(4, 5000, DIM)
    assert not router.noise.weight.any()
    noise = (router(x, frame()).logits - router.scores(x)).detach()
    assert float(noise.std()) == pytest.approx(math.log(2), rel=0.02)  # softplus(0)
    router.noise.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    got = router(x, frame()).logits
    torch.manual_seed(5)
    size = torch.nn.functional.softplus(x @ router.noise.weight.T)
    torch.testing.assert_close(got, router.scores(x) + torch.randn(4, 5000, 3) * size)
    got.sum().backward()
    assert router.noise.weight.grad.abs().sum() > 0


def test_jitter_multiplies_the_input_within_its_bounds():
    router, x = top_k(noise="jitter", noise_eps=0.1).train(), inputs(1, 200, DIM)
    router.score.weight.data = torch.eye(3, DIM)
    factors = router(x, frame()).logits.detach() / x[..., :3]
    assert 0.9 <= float(factors.min()) < 0.92
    assert 1.08 < float(factors.max()) <= 1.1


def test_gumbel_noise_samples_experts_with_their_probabilities():
    router = top_k(noise="gumbel", noise_steps=1, noise_tau=1.0, noise_tau_end=1.0).train()
    x = torch.ones(1, 40000, DIM)
    want = torch.softmax(router.scores(x[:, :1]), -1)[0, 0]
    seen = torch.bincount(router(x, frame()).logits.argmax(-1).flatten(), minlength=3) / 40000
    torch.testing.assert_close(seen, want.detach(), rtol=0, atol=0.02)


def test_the_temperature_of_gumbel_noise_falls_by_equal_factors_once_a_forward():
    router, x = top_k(noise="gumbel", noise_tau=2.0, noise_tau_end=0.5, noise_steps=4).train(), inputs(1, 2, DIM)
    seen = []
    for _ in range(6):
        one = frame()
        router(x, one)
        router(x, one)  # the same forward, computed again
        seen.append(float(next(iter(one.notes.values()))))
    assert seen == pytest.approx([2.0, 2**0.5, 1.0, 0.5**0.5, 0.5, 0.5])
    assert int(router.steps) == 6
    assert "steps" in router.state_dict()


def test_per_example_scores_the_mean_of_the_prompt_only():
    router, x = top_k(per="example", top_k=None), inputs(2, 5, DIM)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    want = torch.stack([x[0, 1:3].mean(0), x[1, :4].mean(0)])
    got = router(x, frame(prompt_mask=mask))
    assert got.weights.shape == (2, 1, 3)
    torch.testing.assert_close(got.weights[:, 0], torch.softmax(want @ router.score.weight.T, -1))
    assert router.keeps
    assert router.needs == {"prompt_mask"}
    with pytest.raises(ValueError, match="prompt_mask"):
        router(x, frame())


def test_generation_takes_all_valid_tokens_for_the_prompt():
    router, x = top_k(per="example", top_k=None), inputs(2, 5, DIM)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    given = router(x, frame(prompt_mask=mask.bool()))
    assert torch.equal(router(x, frame(attention_mask=mask, generating=True)).weights, given.weights)


def test_dropped_experts_get_nothing_and_the_rest_is_renormalised():
    router, x = top_k(expert_dropout=0.5, top_k=None).train(), inputs(64, 3, DIM)
    weights = router(x, frame()).weights
    gone = weights == 0
    assert torch.equal(gone, gone[:, :1].expand_as(gone))  # per example
    assert 0.2 < float(gone.float().mean()) < 0.6
    torch.testing.assert_close(weights.sum(-1), torch.ones(64, 3))
    assert router(x, frame()).logits.isfinite().all()


def test_a_dropped_expert_is_never_worth_more_than_another():
    router = top_k(expert_dropout=0.9, top_k=2, score="sigmoid").train()
    weights = router(inputs(200, 2, DIM), frame()).dense(3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(200, 2))


def test_autocast_does_not_round_the_scores():
    router, x = top_k(top_k=None), inputs(2, 4, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x, frame())
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.weights, router(x, frame()).weights)


def test_a_router_in_bfloat16_computes_in_float32():
    router, x = top_k(top_k=None).bfloat16(), inputs(2, 4, DIM)
    routing = router(x, frame())
    assert routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.weights, torch.softmax(x @ router.score.weight.float().T, -1))


@pytest.mark.parametrize("options", [{}, {"score": "cosine", "proj_dim": 4}, {"bias": True, "noise": "learned"}])
def test_other_experts_leave_the_scores_of_those_that_stay_as_they_are(options):
    config = TopKConfig(**options)
    old = build(TopKRouter, config, named("abc"), seed=0)
    for parameter in old.parameters():
        parameter.data.normal_()
    new = build(TopKRouter, config, named("dcxa"), seed=1)
    new.carry(old)
    x = inputs(2, 4, DIM)
    before, after = old(x, frame()).logits, new(x, frame()).logits
    torch.testing.assert_close(after[..., [3, 1]], before[..., [0, 2]])  # another width rounds in another order
    rows = {"score.weight", "noise.weight", "centroids"} & old.state_dict().keys()
    assert all(torch.equal(new.state_dict()[n][[3, 1]], old.state_dict()[n][[0, 2]]) for n in rows)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"score": "cosine", "bias": True}, "has no bias"),
        ({"score": "sigmoid", "noise": "gumbel"}, "samples from a softmax"),
        ({"scope": "group"}, "needs router.group_by or router.num_groups"),
        ({"num_groups": 2}, "needs router.scope=group"),
        ({"top_k": 1}, "no gradient"),
    ],
)
def test_settings_that_cannot_act_together_are_refused(options, says):
    with pytest.raises(ValidationError, match=says):
        TopKConfig(**options)
