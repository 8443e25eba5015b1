"""Gates that are refreshed every n tokens, or frozen after k: compared with the same rule spelt out without a cache."""

import pytest
import torch
from mixture_cases import mixture

from mole.mixtures import MixtureLayer, TwoStreamCache
from mole.routing import Frame, Routing

OPTIONS = {"max_new_tokens": 9, "eos_token_id": None, "do_sample": False, "return_dict_in_generate": True}
LENGTH = 7


@pytest.fixture
def prompts() -> dict:
    """Two prompts, the first padded on the left."""
    ids = torch.randint(3, 101, (2, LENGTH), generator=torch.Generator().manual_seed(11))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def with_reuse(name: str, **settings):
    model = mixture(name, torch.float64)
    model.router.configure(type(model.router.config)(**{**vars(model.router.config), **settings}))
    return model


def source(position: int, refresh: int, freeze: int | None) -> int:
    """The token whose gates the token at `position` spends: the rule, in plain words."""
    step = position - LENGTH  # decode steps, from 0
    if step < 0:
        return position
    if freeze is not None:
        step = min(step, freeze - 1)
    due = (step + 1) // refresh * refresh - 1  # the last step that ran the routing pass; -1: the prompt's last token
    return LENGTH + due


def scores_by_the_rule(monkeypatch, model, sequences, mask, *, refresh=1, freeze=None):
    """Log-probabilities [B, new, V] of the new tokens, from one forward without cache under gates put together here."""
    model = model.eval()
    mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
    seen = []
    handle = model.router.register_forward_hook(lambda module, args, out: seen.append(out))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        model(input_ids=sequences, attention_mask=mask, position_ids=positions, use_cache=False)
        handle.remove()
        index = torch.tensor([source(p, refresh, freeze) for p in range(sequences.shape[1])])
        spent = {
            site: Routing(r.dense(model.shape.num_experts)[:, index])
            for site, r in zip(model.sites, seen[0], strict=True)
        }
        monkeypatch.setattr(MixtureLayer, "_routing", lambda self, rows, out, frame: spent[self.site])
        with model.fixed_routing({model.expert_names[0]: 1.0}):  # no routing pass; the line above has the gates
            logits = model(input_ids=sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
        monkeypatch.undo()
    return torch.log_softmax(logits[:, LENGTH - 1 : -1].float(), dim=-1)


@pytest.mark.parametrize("name", ["xlora", "xlora_layerwise", "xlora_top_k"])
@pytest.mark.parametrize(("refresh", "freeze"), [(2, None), (4, None), (1, 1), (1, 4), (3, 6)])
def test_tokens_and_scores_follow_the_rule(name, refresh, freeze, prompts, monkeypatch):
    model = with_reuse(name, gate_refresh=refresh, gate_freeze_after=freeze)
    out = model.generate(**prompts, output_scores=True, **OPTIONS)
    want = scores_by_the_rule(
        monkeypatch, model, out.sequences, prompts["attention_mask"], refresh=refresh, freeze=freeze
    )
    for step, scores in enumerate(out.scores):
        torch.testing.assert_close(torch.log_softmax(scores, -1), want[:, step], rtol=0, atol=1e-5)


def test_refreshed_gates_differ_from_exact_ones(prompts):
    exact = mixture("xlora", torch.float64).generate(**prompts, output_scores=True, **OPTIONS)
    reused = with_reuse("xlora", gate_refresh=4).generate(**prompts, output_scores=True, **OPTIONS)
    assert torch.equal(exact.scores[0], reused.scores[0])
    assert not torch.equal(exact.scores[1], reused.scores[1])


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({"gate_refresh": 3}, [7, 7, 1, 1, 3, 1, 1, 1, 3, 1, 1, 1]),
        ({"gate_freeze_after": 2}, [7, 7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_routing_pass_runs_only_where_it_is_due(settings, lengths, prompts):
    model = with_reuse("xlora", **settings)
    seen = []
    model.backbone.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    model.generate(**prompts, **OPTIONS)
    assert seen == lengths[: len(seen)]
    assert len(seen) == 2 + 8 + 2


def test_beams_keep_their_own_gates(prompts, monkeypatch):
    model = with_reuse("xlora", gate_refresh=3)
    one = {key: value[1:] for key, value in prompts.items()}
    out = model.generate(**one, num_beams=4, length_penalty=0.0, output_scores=True, **OPTIONS)
    want = scores_by_the_rule(monkeypatch, model, out.sequences, one["attention_mask"], refresh=3)
    chosen = want.gather(-1, out.sequences[:, LENGTH:, None])[..., 0].sum(-1)
    torch.testing.assert_close(out.sequences_scores, chosen, rtol=0, atol=1e-4)


def test_a_further_turn_is_exact_again():
    model, exact = with_reuse("xlora", gate_refresh=5), mixture("xlora", torch.float64)
    ids = torch.randint(3, 101, (1, 8), generator=torch.Generator().manual_seed(2))
    out = model.generate(input_ids=ids[:, :5], attention_mask=torch.ones(1, 5), **OPTIONS)
    cache = out.past_key_values
    assert isinstance(cache, TwoStreamCache)
    assert cache.reuse.behind == 3  # eight decode steps, the fifth of them ran the routing pass
    held = cache.get_seq_length()
    more = torch.cat([out.sequences[:, held:], ids[:, 5:]], dim=1)
    with torch.no_grad(), model.context.push(Frame(generating=True)):
        hidden_before = cache.scaling.get_seq_length()
        model(input_ids=more, past_key_values=cache, use_cache=True)
        assert cache.scaling.get_seq_length() == hidden_before + 3 + more.shape[1]
    whole = torch.cat([out.sequences[:, :held], more], dim=1)
    fresh = exact(input_ids=whole, use_cache=True).past_key_values
    torch.testing.assert_close(cache.scaling.layers[-1].keys, fresh.scaling.layers[-1].keys, rtol=0, atol=1e-10)


def test_cropping_drops_waiting_tokens_first():
    model = with_reuse("xlora", gate_refresh=5)
    out = model.generate(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), **OPTIONS)
    cache = out.past_key_values
    assert (cache.get_seq_length(), cache.scaling.get_seq_length(), cache.reuse.behind) == (11, 8, 3)
    cache.crop(-2)
    assert (cache.get_seq_length(), cache.scaling.get_seq_length(), cache.reuse.behind) == (9, 8, 1)
    cache.crop(-4)
    assert (cache.get_seq_length(), cache.scaling.get_seq_length(), cache.reuse.behind) == (5, 5, 0)


def test_training_and_plain_forwards_never_reuse():
    reusing, exact = with_reuse("xlora", gate_refresh=5, gate_freeze_after=1), mixture("xlora", torch.float64)
    ids = torch.randint(3, 101, (1, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = exact(input_ids=ids, use_cache=False).logits
        cache, parts = None, []
        for place in range(6):
            out = reusing(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-10)


def test_static_caches_whose_masks_are_for_one_token_are_refused_where_several_would_be_read(prompts):
    """With a sliding window sizes did not fit; without one, tokens that waited saw later ones."""
    options = {**OPTIONS, "cache_implementation": "static", "disable_compile": True}
    with pytest.raises(ValueError, match="gate_refresh=2 reads several tokens.*leave cache_implementation out"):
        with_reuse("xlora", gate_refresh=2).generate(**prompts, **options)
    frozen = with_reuse("xlora", gate_freeze_after=2)
    found = frozen.generate(**prompts, **options)
    assert torch.equal(found.sequences, frozen.generate(**prompts, **OPTIONS).sequences)
    masks = {"attention_mask": torch.ones(2, 1, 1, 32, dtype=torch.bool)}
    with pytest.raises(ValueError, match="more tokens than the attention_mask is made for"):
        found.past_key_values.reuse.with_waiting({"input_ids": prompts["input_ids"], **masks})
