"""Self-speculative decoding gives what ordinary decoding gives, with one read of the weights for a right guess."""

import pytest
import torch
from family_cases import case
from mixture_cases import CONFIGS, mixture

from mole.mixtures import TwoStreamCache
from mole.mixtures.two_pass.speculation import _choose
from mole.routers import XLoraConfig
from mole.routing.log import RoutingLog

ROUTED = [name for name in CONFIGS if name.startswith("xlora")]
OPTIONS = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}


@pytest.fixture
def prompts() -> dict:
    """Three prompts, two padded on the left."""
    ids = torch.randint(3, 101, (3, 7), generator=torch.Generator().manual_seed(11))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    ids[2, :1], mask[2, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ROUTED)
def test_greedy_tokens_and_scores_are_those_of_ordinary_decoding(name, rows, prompts):
    model = mixture(name, torch.float64)
    prompts = {key: value[:rows] for key, value in prompts.items()}
    options = {**OPTIONS, "return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(**prompts, **options)
    drafted = model.generate(**prompts, self_speculation=True, **options)
    assert torch.equal(drafted.sequences, plain.sequences)
    for got, want in zip(drafted.scores, plain.scores, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # scores are float32 in both
    report = model.speculation
    assert report.tokens == 11
    assert report.drafts == 11 * rows
    assert 11 + 1 <= report.reads <= 2 * 11 + 1


def test_reads_are_one_a_token_where_the_backbone_guesses_right_and_two_where_it_never_does(prompts):
    right = mixture("xlora")
    right.router.configure(type(right.router.config)(**{**vars(right.router.config), "global_scaling_weight": 0.0}))
    right.generate(**prompts, self_speculation=True, **OPTIONS)
    assert right.speculation.acceptance == 1.0
    assert right.speculation.reads == right.speculation.tokens + 1  # the first new token has a pass of its own
    wrong = mixture("xlora")
    one = {key: value[:1] for key, value in prompts.items()}
    wrong.backbone.lm_head.register_forward_hook(
        # the routing pass guesses what the mixture likes least: alone in a batch, or behind the mixture's row
        lambda module, args, out: torch.cat([out[:-1], -out[-1:]]) if out.shape[1] == 1 else out
    )
    wrong.generate(**one, self_speculation=True, **OPTIONS)
    report = wrong.speculation
    assert report.accepted < report.drafts
    assert report.reads - report.tokens - 1 in (report.drafts - report.accepted, report.drafts - report.accepted - 1)


def test_the_backbone_runs_once_a_token_where_the_guess_is_right(prompts):
    model = mixture("xlora")
    model.router.configure(type(model.router.config)(**{**vars(model.router.config), "global_scaling_weight": 0.0}))
    shapes = []
    model.backbone.model.layers[0].register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape[:2])))
    model.generate(**prompts, self_speculation=True, **OPTIONS)
    assert shapes == [(3, 7), (3, 7), (3, 1), *[(6, 1)] * 11]


def test_rows_that_end_early_are_padded_as_in_ordinary_decoding(prompts):
    model = mixture("xlora_layerwise", torch.float64)
    options = {**OPTIONS, "max_new_tokens": 10}
    free = model.generate(**prompts, **options)
    ends = sorted({int(free[0, 9]), int(free[1, 12])})
    options = {**options, "eos_token_id": ends, "pad_token_id": 0}
    plain = model.generate(**prompts, **options)
    drafted = model.generate(**prompts, self_speculation=True, **options)
    assert torch.equal(drafted, plain)


def test_the_cache_that_comes_back_goes_on_exactly(prompts):
    model = mixture("xlora", torch.float64)
    one = {key: value[1:2] for key, value in prompts.items()}
    out = model.generate(**one, self_speculation=True, return_dict_in_generate=True, **OPTIONS)
    cache = out.past_key_values
    assert isinstance(cache, TwoStreamCache)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    with torch.no_grad():
        more = torch.cat([out.sequences, torch.tensor([[5, 9]])], dim=1)
        want = model(input_ids=more, use_cache=False).logits[:, -3:]
        got = model(input_ids=more[:, -3:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_a_streamer_sees_what_it_sees_of_ordinary_decoding(prompts):
    class Seen(list):
        def put(self, value):
            self.append(value.tolist())

        def end(self):
            self.append("end")

    one = {key: value[1:2] for key, value in prompts.items()}
    model, seen = mixture("xlora", torch.float64), (Seen(), Seen())
    model.generate(**one, streamer=seen[0], **OPTIONS)
    model.generate(**one, streamer=seen[1], self_speculation=True, **OPTIONS)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 1 + 12 + 1


def test_processors_act_as_in_ordinary_decoding(prompts):
    model = mixture("xlora", torch.float64)
    options = {**OPTIONS, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    plain = model.generate(**prompts, **options)
    assert torch.equal(model.generate(**prompts, self_speculation=True, **options), plain)
    assert not torch.equal(model.generate(**prompts, **OPTIONS), plain)


def test_the_acceptance_rule_draws_from_the_target_whatever_was_guessed():
    target = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    odds = torch.tensor([0.1, 0.6, 0.1, 0.1, 0.1])
    torch.manual_seed(0)
    rows = 200_000
    draft = torch.multinomial(odds, rows, replacement=True)
    token, right = _choose(target.log().expand(rows, -1), (draft, odds.expand(rows, -1)), sample=True)
    found = torch.bincount(token, minlength=5) / rows
    torch.testing.assert_close(found, target, rtol=0, atol=0.005)
    assert right.float().mean().item() == pytest.approx(torch.minimum(target, odds).sum().item(), abs=0.005)
    assert torch.equal(token[right], draft[right])


@pytest.mark.slow
def test_sampled_tokens_have_the_distribution_of_ordinary_sampling():
    model = mixture("xlora")
    ids = torch.tensor([[7, 3, 50]]).expand(4000, -1)
    counts = []
    for speculation in (False, True):
        torch.manual_seed(1)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=0.7,
            max_new_tokens=3,
            eos_token_id=None,
            self_speculation=speculation,
        )
        counts.append([torch.bincount(out[:, place], minlength=101).float() / len(ids) for place in (3, 4, 5)])
    for plain, drafted in zip(*counts, strict=True):
        distance = 0.5 * (plain - drafted).abs().sum()
        noise = 0.5 * (2 * plain.clamp_min(1 / len(ids)) / (3.14159 * len(ids))).sqrt().sum() * 2**0.5
        assert distance < 1.5 * noise


@pytest.mark.parametrize("name", ["xlora", "xlora_layerwise"])
def test_the_log_is_that_of_ordinary_decoding(name, prompts):
    model = mixture(name, torch.float64)
    joined = []
    for speculation in (False, True):
        log = RoutingLog(model.sites, model.expert_names)
        model.listeners.append(log)
        model.generate(**prompts, self_speculation=speculation, **OPTIONS)
        model.listeners.remove(log)
        (sequence,) = log.sequences()
        joined.append(sequence)
    torch.testing.assert_close(joined[1], joined[0], rtol=0, atol=1e-6)


def test_what_speculation_cannot_serve_is_refused(prompts):
    model = mixture("xlora")
    with pytest.raises(ValueError, match="num_beams=1"):
        model.generate(**prompts, self_speculation=True, num_beams=2, **OPTIONS)
    with pytest.raises(ValueError, match="with a cache"):
        model.generate(**prompts, self_speculation=True, use_cache=False, **OPTIONS)
    with model.experts_off(), pytest.raises(ValueError, match="drafts with the routing pass"):
        model.generate(**prompts, self_speculation=True, **OPTIONS)
    with pytest.raises(ValueError, match="plain dynamic caches"):
        model.generate(**prompts, self_speculation=True, cache_implementation="static", **OPTIONS)
    other = mixture(next(name for name in CONFIGS if not name.startswith("xlora")))
    with pytest.raises(ValueError, match="drafts with the routing pass"):
        other.generate(**prompts, self_speculation=True, **OPTIONS)


@pytest.mark.parametrize("new", [1, 2, 12])
@pytest.mark.parametrize("name", ["xlora", "xlora_layerwise", "xlora_top_k"])
def test_the_router_s_latest_word_is_that_of_ordinary_decoding(name, new, prompts):
    model, said = mixture(name, torch.float64), []
    for speculation in (False, True):
        model.generate(**prompts, **{**OPTIONS, "max_new_tokens": new}, self_speculation=speculation)
        said.append(model.router.latest)
    for got, want in zip(said[1], said[0], strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_backbones_whose_head_calls_the_inner_decoder_itself_draft_too(family, tmp_path):
    one = case(family, tmp_path, XLoraConfig(layerwise=True, temperature=0.3, dtype="float64"))
    model, prompt = one.model.double(), one.inputs["input_ids"][:1]
    options = {**OPTIONS, "attention_mask": torch.ones_like(prompt)}
    want = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, self_speculation=True, **options), want)
    assert model.speculation.tokens == 11
