"""Generation with the KV cache equals recomputing everything for every token: tokens and logits, in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from mixture_cases import CONFIGS, llama, mixture, three_experts
from transformers.cache_utils import DynamicCache, StaticCache

from mole.mixtures import MultiExpertModel, TwoStreamCache
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


def test_another_model_or_router_of_equal_settings_does_not_go_on_with_a_cache(prompts):
    model, ids = mixture("xlora"), prompts["input_ids"][1:]
    with torch.no_grad():
        for other in (mixture("xlora"), copy.deepcopy(model)):
            pair = model(input_ids=ids, use_cache=True).past_key_values
            with pytest.raises(ValueError, match="or it is another model's"):
                other(input_ids=ids[:, :1], past_key_values=pair, use_cache=True)
            model(input_ids=ids[:, :1], past_key_values=pair, use_cache=True)
        twin = copy.deepcopy(model.router)
        with model.routed_by(twin), pytest.raises(ValueError, match="or it is another model's"):
            model(input_ids=ids[:, :1], past_key_values=pair, use_cache=True)


def test_both_streams_are_made_early_and_moved_away_and_back():
    config = mixture("uniform").config
    pair = TwoStreamCache(StaticCache(config=config, max_cache_len=16))
    pair.early_initialization(2, config.num_key_value_heads, 8, torch.float32, torch.device("cpu"))
    streams = (pair.mixture, pair.scaling)
    assert [[layer.keys.shape for layer in stream.layers] for stream in streams] == [[(2, 2, 16, 8)] * 2] * 2
    moves = []
    for stream in streams:
        stream.offload = lambda *args, s=stream: moves.append(("offload", s is pair.scaling, args))
        stream.prefetch = lambda *args, s=stream: moves.append(("prefetch", s is pair.scaling, args))
    pair.offload(0, False)
    pair.prefetch(1, False)
    assert moves == [
        (n, scaling, a) for n, a in (("offload", (0, False)), ("prefetch", (1, False))) for scaling in (0, 1)
    ]
    for name in ("update", "update_conv_state", "update_recurrent_state", "update_indexer"):
        with pytest.raises(RuntimeError, match="no mixture with a routing pass"):
            getattr(pair, name)(torch.zeros(1), 0)


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


@pytest.mark.parametrize("name", ["xlora", "top_k"])
def test_keys_and_values_as_tuples_are_refused(name, prompts):
    ids = prompts["input_ids"][1:]
    with pytest.raises(ValueError, match="past_key_values: got a tuple, need a transformers Cache"):
        mixture(name)(input_ids=ids, past_key_values=((torch.zeros(1, 2, 3, 8),) * 2,) * 2)


def test_a_cache_in_training_mode_is_refused_where_dropout_acts(prompts):
    """Of the router, of the backbone, of experts that train; not where none acts."""
    ids = prompts["input_ids"][1:]
    dropping = mixture("xlora_top_k").train()  # of depth 3
    with pytest.raises(ValueError, match=r"dropout acts at router\.classifier"):
        dropping(input_ids=ids, use_cache=True)
    plain = mixture("xlora").train()
    cache = plain(input_ids=ids, use_cache=True).past_key_values
    plain.backbone.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout acts at backbone\.model\.layers\.1\.self_attn:"):
        plain(input_ids=ids, past_key_values=cache)
    plain(input_ids=ids)
    plain.eval()(input_ids=ids, use_cache=True)
    backbone = llama()
    experts = {name: replace(one, dropout=0.1) for name, one in three_experts(backbone).items()}
    trained = MultiExpertModel(backbone, experts, CONFIGS["xlora"]).train()
    trained(input_ids=ids, use_cache=True)
    trained.set_trainable("both")
    with pytest.raises(ValueError, match=r"dropout acts at backbone\..*\.bank"):
        trained(input_ids=ids, use_cache=True)


@pytest.mark.parametrize("name", ["xlora", "top_k"])
def test_continuous_batching_is_refused(name, prompts):
    model, ids = mixture(name), prompts["input_ids"][1:]
    with pytest.raises(ValueError, match="cache_implementation='paged'"):
        model.generate(ids, cache_implementation="paged", max_new_tokens=2)
    settings = copy.deepcopy(model.generation_config)
    settings.cache_implementation = "paged"
    with pytest.raises(ValueError, match="cache_implementation='paged'"):
        model.generate(ids, generation_config=settings, max_new_tokens=2)
    for call in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        with pytest.raises(ValueError, match="continuous batching"):
            call([ids[0].tolist()])


@pytest.mark.parametrize("name", ["xlora", "xlora_top_k", "top_k", "uniform"])
def test_a_prompt_of_embeddings_goes_on_exactly(name, prompts):
    model = mixture(name, torch.float64)
    mask = prompts["attention_mask"]
    embeds = model.get_input_embeddings().weight[prompts["input_ids"]].detach() + 0.1  # of no tokens at all
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    got = model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    for _ in range(5):
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            out = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(token, got[:, :1])
        embeds = torch.cat([embeds, model.get_input_embeddings().weight[token].detach()], dim=1)
        mask, got = torch.nn.functional.pad(mask, (0, 1), value=1), got[:, 1:]
    with pytest.raises(ValueError, match="inputs_embeds with use_cache=False"):
        model.generate(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **options)
