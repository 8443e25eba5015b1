"""Models after surgery under autocast, torch.compile and Accelerate; other architectures."""

import pytest
import torch
from accelerate import Accelerator
from surgery_cases import MLPS, batch, llama
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from mole.moe import MoEConfig, MoERouterConfig, aux_loss, moefy, record_routing, unmoefy, update_router_bias


def surgered(**settings):
    model = llama()
    moefy(model, MLPS, **{"num_experts": 3, "k": 2, "noise": None, **settings})
    return model


def test_under_autocast_experts_compute_in_bfloat16_and_routers_in_float32():
    model, given = surgered(), batch()
    seen = []
    model.model.layers[0].mlp.experts[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**given).logits
    assert model.model.layers[0].mlp.last.weights.dtype == torch.float32
    assert all(dtype == torch.bfloat16 for dtype in seen)
    with torch.no_grad():
        wanted = model(**given).logits
    assert (output.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_accelerate_prepares_and_trains_a_surgered_model():
    model = surgered()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    losses = []
    for _ in range(8):
        given = batch(padded=3)
        labels = torch.where(given["attention_mask"].bool(), given["input_ids"], -100)
        loss = model(**given, labels=labels).loss
        accelerator.backward(loss + aux_loss(model))
        optimizer.step()
        optimizer.zero_grad()
        update_router_bias(model)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.slow
def test_compiled_is_eager():
    model = surgered(backend="vmap")
    given = batch()
    with torch.no_grad():
        wanted = model(**given).logits
        found = torch.compile(model, backend="eager")(**given).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_linear_layers_of_gpt2_and_encoders_take_part():
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    bert = BertModel(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    ).eval()
    for model, pattern in ((gpt, r"transformer\.h\.0\.mlp"), (bert, r"encoder\.layer\.0\.intermediate")):
        given = batch(padded=3)
        with torch.no_grad():
            wanted = model(**given)[0]
            moefy(model, pattern, num_experts=2, init_noise=0.0)
            found = model(**given)[0]
        mask = given["attention_mask"].bool()
        assert (found - wanted)[mask].abs().max() <= 2e-6 * wanted.abs().max()


def test_experts_may_choose_in_an_encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertModel(BertConfig(vocab_size=64, **sizes)).eval()
    moefy(model, r"encoder\.layer\.0\.intermediate", num_experts=2, aggregation="sum", expert_choice=True, k=3)
    with record_routing(model) as stats:
        model(**batch())
    assert stats["encoder.layer.0.intermediate"].loads.tolist() == [9, 9]


def test_an_encoders_mask_is_not_taken_for_the_decoders():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    given = {**batch(padded=4), "decoder_input_ids": batch()["input_ids"]}
    with torch.no_grad():
        wanted = model(**given).logits
        moefy(model, r"(encoder|decoder)\.block\.0\.layer\.\d\.DenseReluDense", num_experts=2, init_noise=0.0)
        with record_routing(model) as stats:
            found = model(**given).logits
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    assert [each.tokens for each in stats.values()] == [33, 33]
    unmoefy(model)


def test_a_depth_router_needs_its_predictor_for_generation_with_a_cache():
    model = llama()
    config = MoEConfig(router=MoERouterConfig(name="depth", capacity_factor=0.5))
    moefy(model, MLPS, num_experts=1, config=config)
    with pytest.raises(RuntimeError, match="predictor"):
        model.generate(**batch(), max_new_tokens=2, do_sample=False)
    model.train()
    (model(**batch()).logits.square().mean() + aux_loss(model)).backward()
    model.eval()
    assert model.generate(**batch(), max_new_tokens=2, do_sample=False).shape[1] == 13


def test_whatever_takes_a_tensor_can_be_wrapped():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5)))
    x = torch.randn(3, 4, 6)
    wanted = model(x)
    moefy(model, "[01]", num_experts=3, init_noise=0.0)
    assert torch.allclose(model(x), wanted, atol=1e-6)
