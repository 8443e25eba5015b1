"""SMEAR's pooling, posterior and centring against the formulas; what it may not read."""

import pytest
import torch
from pydantic import ValidationError
from router_cases import DIM, build, frame, inputs, named, shape

from mole.routers import SmearConfig, SmearRouter

MASK = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()


def smear(seed=0, num_experts=3, **options) -> SmearRouter:
    router = build(SmearRouter, SmearConfig(**{"init_std": 1.0, **options}), shape(num_experts), seed)
    for parameter in router.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return router


def by_hand(router, pooled, part="prior"):
    """Logits of pooled vectors [.., d], in float64."""
    scores = getattr(router, part)
    h = pooled.double()
    if scores.norm is not None:
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = h * scores.norm.weight.double() + scores.norm.bias.double()
    W = scores.linear.weight.double()
    if router.config.normalise_rows:
        W = W / W.norm(dim=-1, keepdim=True)
    return h @ W.T + scores.linear.bias.double()


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("normalise_rows", [True, False])
def test_weights_are_the_softmax_of_the_mean_over_the_prompt(layer_norm, normalise_rows):
    router = smear(layer_norm=layer_norm, normalise_rows=normalise_rows, temperature=0.7)
    x = inputs(2, 5, DIM)
    pooled = torch.stack([x[0, 1:3].mean(0), x[1, :4].mean(0)])[:, None]
    want = torch.softmax(by_hand(router, pooled) / 0.7, -1)
    got = router(x, frame(prompt_mask=MASK))
    assert got.weights.shape == (2, 1, 3)
    torch.testing.assert_close(got.weights.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.logits.double(), by_hand(router, pooled) / 0.7, rtol=1e-5, atol=1e-5)


def test_nothing_but_the_prompt_is_read():
    router, x = smear(), inputs(2, 5, DIM)
    other = torch.where(MASK[..., None], x, inputs(2, 5, DIM, seed=9))
    assert torch.equal(*(router(seen, frame(prompt_mask=MASK)).weights for seen in (x, other)))


def test_an_example_without_a_prompt_is_routed_by_the_bias():
    router, x = smear(layer_norm=False), inputs(1, 3, DIM)
    got = router(x, frame(prompt_mask=torch.zeros(1, 3, dtype=torch.bool))).weights[0, 0]
    torch.testing.assert_close(got, torch.softmax(router.prior.linear.bias, -1))


def test_beams_share_the_mask_of_their_example_and_flat_tokens_are_put_in_rows():
    router, x = smear(), inputs(2, 5, DIM)
    want = router(x, frame(prompt_mask=MASK)).weights
    beams = router(x.repeat_interleave(2, 0), frame(prompt_mask=MASK)).weights
    torch.testing.assert_close(beams, want.repeat_interleave(2, 0))
    torch.testing.assert_close(router(x.view(1, 10, DIM), frame(prompt_mask=MASK)).weights, want)
    with pytest.raises(ValueError, match="a router for the whole model"):
        router(x[:, :3], frame(prompt_mask=MASK))


def test_pool_full_means_all_valid_tokens_whatever_the_padding():
    router, x = smear(pool="full"), inputs(1, 3, DIM)
    padded = torch.cat([inputs(1, 2, DIM, seed=8), x, inputs(1, 4, DIM, seed=9)], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0]])
    torch.testing.assert_close(router(padded, frame(attention_mask=mask)).weights, router(x, frame()).weights)
    assert router.reads_ahead
    assert not smear().reads_ahead


def test_pool_causal_means_the_valid_tokens_so_far():
    router, x = smear(pool="causal"), inputs(2, 5, DIM)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    got = router(x, frame(attention_mask=mask)).weights
    for row, token in [(0, 2), (0, 4), (1, 0), (1, 3)]:
        seen = x[row, : token + 1][mask[row, : token + 1].bool()].mean(0)
        want = torch.softmax(by_hand(router, seen), -1)
        torch.testing.assert_close(got[row, token].double(), want, rtol=1e-5, atol=1e-6)


def test_pool_causal_goes_on_from_the_cache_of_generate():
    router, x, kept = smear(pool="causal"), inputs(2, 6, DIM), {}
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    full = router(x, frame(attention_mask=mask)).weights
    parts = [(0, 3), (3, 4), (4, 6)]
    got = [
        router(x[:, a:b], frame(attention_mask=mask[:, :b], generating=True, goes_on=a > 0, kept=kept)).weights
        for a, b in parts
    ]
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], full[mask.bool()])
    kept["layers.0.q"].reorder(torch.tensor([1, 1]))
    assert torch.equal(kept["layers.0.q"].sums[0], kept["layers.0.q"].sums[1])
    with pytest.raises(ValueError, match="continues a cache"):  # which was cut to four tokens
        router(x[:, 4:5], frame(attention_mask=mask[:, :5], generating=True, goes_on=True, kept=kept))
    with pytest.raises(ValueError, match="pass the whole text"):
        router(x[:, 4:5], frame(attention_mask=mask[:, :5], goes_on=True))


def test_the_decoder_reads_the_mean_of_the_encoders_output():
    sites = ("encoder.block.0.q", "decoder.block.0.q")
    config, states = SmearConfig(pool="full", source="encoder", init_std=1.0), inputs(2, 4, DIM, seed=5)
    decoder = build(SmearRouter, config, shape(sites=sites), sites=sites[1:], input_dim=99)
    encoder = build(SmearRouter, config, shape(sites=sites), sites=sites[:1])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    got = decoder(inputs(2, 1, 99), frame(encoder_states=states, attention_mask=mask)).weights
    pooled = torch.stack([states[0, :3].mean(0), states[1].mean(0)])[:, None]
    torch.testing.assert_close(got.double(), torch.softmax(by_hand(decoder, pooled), -1), rtol=1e-5, atol=1e-6)
    assert not encoder.reads_encoder
    assert not decoder.reads_ahead
    with pytest.raises(ValueError, match="encoder_states"):
        decoder(inputs(2, 1, 99), frame())


def test_the_centre_follows_the_scores_in_training_and_is_subtracted():
    router, x = smear(center_momentum=0.75, expert_dropout=0.0), inputs(2, 5, DIM)
    plain = by_hand(router, torch.stack([x[0, 1:3].mean(0), x[1, :4].mean(0)])[:, None]).float()
    router.train()
    one = frame(prompt_mask=MASK)
    first = router(x, one).logits
    again = router(x, one).logits  # the same forward, computed again
    centre = 0.25 * plain.mean((0, 1))
    torch.testing.assert_close(router.center, centre.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first, plain - centre, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, again)
    router.eval()
    torch.testing.assert_close(router(x, frame(prompt_mask=MASK)).logits, plain - centre, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(router.center, centre.detach(), rtol=1e-5, atol=1e-6)


def test_the_posterior_routes_training_and_the_prompts_router_is_held_to_it():
    router, x = smear(posterior=True, kl=0.5, expert_dropout=0.0), inputs(2, 5, DIM)
    whole = by_hand(router, x.mean(1, keepdim=True), "posterior")
    prompt = by_hand(router, torch.stack([x[0, 1:3].mean(0), x[1, :4].mean(0)])[:, None])
    in_eval = frame(prompt_mask=MASK)
    torch.testing.assert_close(router(x, in_eval).weights.double(), torch.softmax(prompt, -1), rtol=1e-5, atol=1e-6)
    assert not in_eval.penalties
    router.train()
    one = frame(prompt_mask=MASK)
    torch.testing.assert_close(router(x, one).weights.double(), torch.softmax(whole, -1), rtol=1e-5, atol=1e-6)
    p, q = torch.softmax(whole, -1), torch.softmax(prompt, -1)
    want = 0.5 * (p * (p / q).log()).sum(-1).mean()
    (got,) = one.penalties.values()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    got.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())


def test_other_experts_leave_the_scores_of_those_that_stay_as_they_are():
    config = SmearConfig(center_momentum=0.5, posterior=True)
    old, new = build(SmearRouter, config, named("abc")), build(SmearRouter, config, named("dcxa"), seed=1)
    for tensor in old.state_dict().values():
        tensor.normal_()
    new.carry(old)
    x, one = inputs(2, 5, DIM), frame(prompt_mask=MASK)
    torch.testing.assert_close(new(x, one).logits[..., [3, 1]], old(x, one).logits[..., [0, 2]])
    new.train(), old.train()
    torch.testing.assert_close(new(x, one).logits[..., [3, 1]], old(x, one).logits[..., [0, 2]])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"posterior": True, "pool": "causal"}, "see the text already"),
        ({"source": "encoder"}, "set router.pool=full"),
        ({"top_k": 1}, "no gradient"),
    ],
)
def test_settings_that_cannot_act_together_are_refused(options, says):
    with pytest.raises(ValidationError, match=says):
        SmearConfig(**options)
