"""SMEAR where something reads the whole text: encoders, and decoders that read what an encoder gave."""

import pytest
import torch
from mixture_cases import expert
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from mole.mixtures import MultiExpertModel
from mole.routers import SmearConfig

TINY = {"vocab_size": 51, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def mixture(backbone, config, *targets) -> MultiExpertModel:
    experts = {
        name: expert(backbone, targets, rank=2, alpha=alpha, seed=seed, dtype=torch.float64)
        for seed, (name, alpha) in enumerate((("a", 2.0), ("b", 4.0)), 1)
    }
    model = MultiExpertModel(backbone, experts, config).eval()
    generator = torch.Generator().manual_seed(7)
    for router in model.routers().values():
        for parameter in router.double().parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**sizes, **TINY, initializer_range=0.3)).double().eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **TINY)).double().eval()


def text():
    ids = torch.randint(3, 51, (2, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_an_encoder_pools_all_of_its_valid_tokens():
    model = mixture(bert(), SmearConfig(pool="full"), "query", "output.dense")
    both, given = model(**text()).logits, text()
    short = model(input_ids=given["input_ids"][1:, :4]).logits  # without its padding
    torch.testing.assert_close(both[1:], short, rtol=0, atol=1e-10)
    layer = next(iter(model.layers.values()))
    seen = []
    layer.router.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model(**given)
    x, routing = seen[0]
    h = torch.nn.functional.layer_norm(torch.stack([x[0].mean(0), x[1, :4].mean(0)]), (16,))
    scores = layer.router.prior
    h = h * scores.norm.weight + scores.norm.bias
    want = torch.softmax(h @ scores.linear.weight.T + scores.linear.bias, -1)
    torch.testing.assert_close(routing.weights[:, 0], want)


def test_a_decoders_modules_are_routed_by_the_mean_of_the_encoders_output():
    model = mixture(t5(), SmearConfig(pool="full", source="encoder"), "SelfAttention.q", "wo", "EncDecAttention.v")
    seen, given = {}, text()
    for site, router in model.routers().items():
        router.register_forward_hook(lambda _, args, out, site=site: seen.update({site: out}))
    output = model(**given, decoder_input_ids=torch.tensor([[0, 7, 8], [0, 9, 4]]))
    states = output.encoder_last_hidden_state
    pooled = torch.stack([states[0].mean(0), states[1, :4].mean(0)])
    decoders = [site for site in seen if site.startswith("decoder")]
    assert len(decoders) == 6
    assert len(seen) == 10
    for site in decoders:
        scores = model.routers()[site].prior
        h = torch.nn.functional.layer_norm(pooled, (16,), scores.norm.weight, scores.norm.bias)
        want = torch.softmax(h @ scores.linear.weight.T + scores.linear.bias, -1)
        torch.testing.assert_close(seen[site].weights[:, 0], want)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_an_encoder_decoder_generates_exactly_with_its_cache(options):
    model = mixture(t5(), SmearConfig(pool="full", source="encoder"), "SelfAttention.q", "wo", "EncDecAttention.v")
    cached, anew = (
        model.generate(
            **text(),
            max_new_tokens=5,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, anew.sequences)
    for first, second in zip(cached.logits, anew.logits, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


def test_a_decoder_that_pools_its_own_tokens_would_read_ahead():
    backbone = t5()
    with pytest.raises(ValueError, match="the tokens of a T5ForConditionalGeneration see earlier ones only"):
        mixture(backbone, SmearConfig(pool="full"), "wo")
