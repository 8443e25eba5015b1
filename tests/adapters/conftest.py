"""Tiny backbones made from a config, and inputs for them."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

torch.set_num_threads(1)


def make_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=32, **sizes)).eval()


def make_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32)).eval()


ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
ENCODER |= {"vocab_size": 32, "max_position_embeddings": 32, "initializer_range": 0.2}


def make_bert():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**ENCODER)).eval()


def make_roberta():
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**ENCODER)).eval()


@pytest.fixture
def llama():
    return make_llama()


@pytest.fixture
def gpt2():
    return make_gpt2()


@pytest.fixture
def bert():
    return make_bert()


@pytest.fixture
def roberta():
    return make_roberta()


@pytest.fixture(params=["llama", "gpt2"])
def backbone(request):
    return {"llama": make_llama, "gpt2": make_gpt2}[request.param]()


@pytest.fixture
def tokens():
    return torch.arange(14).reshape(2, 7)
