"""Backbones in 8 and 4 bits, where bitsandbytes is installed; the error where it is not."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mole.backbones import PretrainedConfig, load, quantised
from mole.backbones.tiny_backbone import FOLDER


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, eos_token_id=2, **sizes)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path / name)
    return str(tmp_path)


def test_without_bitsandbytes_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"backbone.bits=4 needs bitsandbytes: .*mole-experts\[quantised\]"):
        load(PretrainedConfig(path=folder, bits=4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_layers_are_packed_and_the_backbone_is_still_the_same_one(folder, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    whole = load(PretrainedConfig(path=folder))
    packed = load(PretrainedConfig(path=folder, bits=bits))
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    assert isinstance(packed.model.model.layers[0].mlp.up_proj, kind)
    assert not packed.model.model.layers[0].mlp.up_proj.weight.is_floating_point()
    assert packed.shapes == whole.shapes
    assert not any(p.requires_grad for p in packed.model.parameters())
    ids = torch.arange(3, 10, device=packed.model.device)[None]
    with torch.no_grad():
        want = whole.model(ids).logits.float()
        assert (packed.model(ids).logits.float() - want).norm() < 0.3 * want.norm()
