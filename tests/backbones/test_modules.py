"""Modules found by pattern, and replaced."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from mole.backbones import find_modules, get_module, in_out_features, replace_module

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
    )


def test_all_linear_is_every_linear_module_but_the_output_head(llama):
    found = find_modules(llama, "all-linear")
    linear = [path for path, module in llama.named_modules() if isinstance(module, nn.Linear)]
    assert list(found) == [path for path in linear if path != "lm_head"]
    assert len(found) == 14
    assert all(found[path] is llama.get_submodule(path) for path in found)


def test_all_linear_takes_the_conv1d_of_gpt2():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    found = find_modules(model, "all-linear")
    assert [path.rsplit(".", 1)[-1] for path in found] == ["c_attn", "c_proj", "c_fc", "c_proj"]
    assert in_out_features(found["transformer.h.0.attn.c_attn"]) == (8, 24)


def test_a_name_matches_the_end_of_paths_in_whole_components(llama):
    assert list(find_modules(llama, "q_proj")) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert list(find_modules(llama, "mlp.up_proj")) == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    with pytest.raises(ValueError, match="matches no module"):
        find_modules(llama, "proj")


def test_order_is_that_of_the_model_whatever_the_order_of_targets(llama):
    forward, backward = find_modules(llama, SEVEN), find_modules(llama, SEVEN[::-1])
    assert list(forward) == list(backward) == list(find_modules(llama, "all-linear"))


def test_a_pattern_takes_linear_modules_on_whole_paths(llama):
    found = find_modules(llama, "model.layers.1.mlp.*")
    assert list(found) == [f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]


def test_a_whole_path_names_any_module(llama):
    assert list(find_modules(llama, ("model.layers.0.mlp",))) == ["model.layers.0.mlp"]


def test_a_target_that_matches_nothing_names_near_ones(llama):
    with pytest.raises(ValueError, match=r"'q_prj' matches no module; did you mean q_proj.*linear modules: .*v_proj"):
        find_modules(llama, ("v_proj", "q_prj"))


def test_no_target_is_refused(llama):
    with pytest.raises(ValueError, match="no target modules given"):
        find_modules(llama, ())


def test_a_replaced_module_is_the_one_that_runs(llama):
    path = "model.layers.0.mlp.up_proj"
    base = get_module(llama, path)

    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * base(x)

    ids = torch.tensor([[1, 2, 3]])
    before = llama(input_ids=ids).logits
    replace_module(llama, path, Doubled())
    assert not torch.equal(llama(input_ids=ids).logits, before)
    replace_module(llama, path, base)
    assert torch.equal(llama(input_ids=ids).logits, before)
    assert get_module(llama, path) is base


def test_a_path_that_is_not_there_cannot_be_replaced(llama):
    with pytest.raises(AttributeError):
        replace_module(llama, "model.layers.0.mlp.nothing", nn.Identity())
    assert not hasattr(llama.model.layers[0].mlp, "nothing")


def test_widths_are_input_then_output():
    assert in_out_features(nn.Linear(3, 5)) == (3, 5)
    assert in_out_features(Conv1D(5, 3)) == (3, 5)
    with pytest.raises(ValueError, match="a LayerNorm has no input and output width"):
        in_out_features(nn.LayerNorm(4))
