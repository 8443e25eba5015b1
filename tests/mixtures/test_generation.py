"""Generation with the KV cache equals recomputing everything for every token: tokens and logits, in float64."""

import pytest
import torch
from mixture_cases import CONFIGS, mixture
from transformers.cache_utils import DynamicCache

from mole.mixtures import TwoStreamCache
from mole.routing.log import RoutingLog
from mole.routing.log_files import join_sequences

ROUTED = [name for name in CONFIGS if name.startswith("xlora")]


@pytest.fixture
def prompts() -> dict:
    """Two prompts, the first padded on the left."""
    ids = torch.randint(3, 101, (2, 7), generator=torch.Generator().manual_seed(11))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "task_names": ["spell", "date"]}


def compare(model, prompts, **options):
    """Tokens with and without cache; logits too, where generate gives them."""
    outcomes = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outcomes.append(
            model.generate(
                **prompts,
                max_new_tokens=8,
                use_cache=use_cache,
                return_dict_in_generate=True,
                output_logits=True,
                eos_token_id=None,
                **options,
            )
        )
    cached, recomputed = outcomes
    assert torch.equal(cached.sequences, recomputed.sequences)
    for first, second in zip(cached.logits, recomputed.logits, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "sampled", "beams", "several"],
)
def test_cached_generation_is_exact(name, options, prompts):
    compare(mixture(name, torch.float64), prompts, **options)


@pytest.mark.parametrize("name", ROUTED)
def test_each_decode_step_is_one_token_through_each_pass(name, prompts):
    model = mixture(name)
    lengths = []
    model.backbone.model.layers[0].register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    heads = []
    model.backbone.lm_head.register_forward_pre_hook(lambda m, args: heads.append(1))
    model.generate(**prompts, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert lengths == [7, 7] + [1, 1] * 4
    assert len(heads) == 5  # the routing pass runs no head


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("chunks", [(7,), (5, 1, 1), (1,) * 7])
def test_any_chunks_of_a_prompt_give_the_logits_of_the_whole(name, chunks):
    model = mixture(name, torch.float64)
    ids = torch.randint(3, 101, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        cache, parts, start = None, [], 0
        for size in chunks:
            out = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            parts.append(out.logits)
    assert isinstance(cache, TwoStreamCache)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-10)


def test_a_plain_empty_cache_is_adopted_and_its_sibling_remembered():
    model = mixture("xlora_layerwise", torch.float64)
    ids = torch.randint(3, 101, (1, 6), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True).logits
        second = model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True).logits  # the plain cache again
    torch.testing.assert_close(torch.cat([first, second], 1), want, rtol=0, atol=1e-10)
    assert cache.get_seq_length() == 6


def test_a_cropped_pair_goes_on_exactly():
    model = mixture("xlora", torch.float64)
    ids = torch.randint(3, 101, (1, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        cache.crop(-2)
        rest = model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, want[:, 4:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["xlora"])
def test_caches_that_cannot_go_on_are_refused(name, prompts):
    model = mixture(name)
    ids = prompts["input_ids"][1:]
    foreign = DynamicCache(config=model.config)
    with torch.no_grad():
        with model.experts_off():
            model(input_ids=ids, past_key_values=foreign, use_cache=True)
        with pytest.raises(ValueError, match="starts from an empty cache"):
            model(input_ids=ids[:, :1], past_key_values=foreign, use_cache=True)
        pair = model(input_ids=ids, use_cache=True).past_key_values
        with model.experts_off(), pytest.raises(ValueError, match="routing pass"):
            model(input_ids=ids[:, :1], past_key_values=pair, use_cache=True)
        with model.experts_off(), pytest.raises(RuntimeError, match="no mixture with a routing pass"):
            model.backbone(input_ids=ids[:, :1], past_key_values=pair, use_cache=True)
        model.router.classifier[0].bias.add_(1.0)
        with pytest.raises(ValueError, match="changed since this cache was filled"):
            model(input_ids=ids[:, :1], past_key_values=pair, use_cache=True)


def test_a_cache_is_refused_once_trained_experts_have_changed(prompts):
    model, ids = mixture("xlora"), prompts["input_ids"][1:]
    model.set_trainable("both")
    with torch.no_grad():
        pair = model(input_ids=ids, use_cache=True).past_key_values
        next(iter(model.layers.values())).bank.A.add_(1.0)
        with pytest.raises(ValueError, match="changed since this cache was filled"):
            model(input_ids=ids[:, :1], past_key_values=pair, use_cache=True)


def test_generation_without_experts_equals_the_backbones(prompts):
    model = mixture("xlora")
    inputs = {k: prompts[k] for k in ("input_ids", "attention_mask")}
    want = model.unload().generate(**inputs, max_new_tokens=6, do_sample=False)
    model = mixture("xlora")
    with model.experts_off():
        assert torch.equal(model.generate(**prompts, max_new_tokens=6, do_sample=False), want)


@pytest.mark.parametrize("name", ["xlora_layerwise", "top_k"])
def test_the_log_of_beams_is_the_routing_of_each_beam_s_own_tokens(name, prompts):
    model = mixture(name, torch.float64)
    log = RoutingLog(model.sites, model.expert_names)
    model.listeners.append(log)
    model.generate(**prompts, max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    (joined,) = join_sequences([entry.logged() for entry in log._entries])
    log.clear()
    tokens = torch.from_numpy(joined.tokens)
    mask = torch.from_numpy(joined.mask)
    with torch.no_grad():
        model(
            input_ids=tokens.clamp_min(0),
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            task_names=["spell"] * 3 + ["date"] * 3,
        )
    (want,) = log.entries()
    torch.testing.assert_close(torch.from_numpy(joined.weights)[mask], want[mask], rtol=0, atol=1e-6)
