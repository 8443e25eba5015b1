"""transformers' ways of generating under X-LoRA: each gives the tokens of recomputing everything for every token."""

import pytest
import torch
from family_cases import case
from mixture_cases import llama, mixture

from mole.mixtures import TwoStreamCache
from mole.routers import XLoraConfig

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}
NAMES = ["xlora", "xlora_layerwise", "xlora_top_k_softmax", "xlora_scaling_pass"]


def tokens(rows=2, length=9, seed=3) -> torch.Tensor:
    """Rows in which the same pieces come again, so that they can be looked up."""
    piece = torch.randint(3, 101, (rows, 4), generator=torch.Generator().manual_seed(seed))
    return piece.repeat(1, 3)[:, :length]


@pytest.fixture(params=NAMES)
def model(request):
    return mixture(request.param, torch.float64)


def spy(model) -> list[int]:
    """How many tokens each pass reads, as they come."""
    lengths: list[int] = []
    model.backbone.model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    return lengths


def test_prompt_lookup(model):
    ids = tokens(1)
    want = model.generate(ids, use_cache=False, **GREEDY)
    lengths = spy(model)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), want)
    assert max(lengths[2:]) > 1  # several tokens checked at once


def test_an_assistant_s_drafts(model):
    ids, assistant = tokens(1), llama(torch.float64)
    want = model.generate(ids, use_cache=False, **GREEDY)
    lengths = spy(model)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), want)
    assert max(lengths[2:]) > 1


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_a_prompt_read_in_chunks(model, size):
    ids = tokens()
    want = model.generate(ids, use_cache=False, **GREEDY)
    lengths = spy(model)
    assert torch.equal(model.generate(ids, prefill_chunk_size=size, **GREEDY), want)
    assert max(lengths) == size


def test_static_caches_of_rows_padded_on_the_left(model):
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    want = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    options = {**GREEDY, "cache_implementation": "static", "disable_compile": True, "return_dict_in_generate": True}
    found = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(found.sequences, want)
    pair = found.past_key_values
    assert isinstance(pair, TwoStreamCache)
    kinds = {type(layer).__name__ for stream in (pair.mixture, pair.scaling) for layer in stream.layers}
    assert kinds == {"StaticLayer"}


@pytest.mark.parametrize("kind", [None, "static"])
def test_sliding_windows_shorter_than_the_text(kind, tmp_path):
    one = case("gemma3", tmp_path, XLoraConfig(layerwise=True, temperature=0.3, dtype="float64"))
    model, ids = one.model.double(), one.inputs["input_ids"][:1]
    assert model.config.sliding_window < ids.shape[1]
    want = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, cache_implementation=kind, disable_compile=True, **GREEDY), want)


def test_a_cache_that_goes_on_over_three_turns(model):
    history, cache = tokens(), None
    for turn in range(3):
        want = model.generate(history, use_cache=False, **GREEDY)
        given = {} if cache is None else {"past_key_values": cache}
        lengths = spy(model)
        found = model.generate(history, return_dict_in_generate=True, **given, **GREEDY)
        assert torch.equal(found.sequences, want)
        assert lengths[0] == (9 if turn == 0 else 1 + 3)  # the last token of a turn is in no cache yet
        cache = found.past_key_values
        history = torch.cat([found.sequences, tokens(length=3, seed=turn)], dim=1)
