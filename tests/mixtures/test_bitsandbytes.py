"""Backbones in 4 and 8 bits by bitsandbytes, where it is installed: wrapped as they are, equal to PEFT's on them."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mole.adapters import peft_format
from mole.backbones.modules import compute_dtype_of, dense_weight, kind_of
from mole.mixtures import MultiExpertModel
from mole.routers import XLoraConfig

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of which there are many
SETTINGS = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["v_proj", "q_proj"], "use_dora": True},
    {"target_modules": ["up_proj"], "lora_bias": True},
]


def quantised(bits, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=51,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and path != "lm_head":
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            if bits == 4:
                layer = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
            else:
                layer = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            layer.load_state_dict(linear.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_on_a_quantised_backbone_equal_peft(bits, tmp_path):
    theirs, adapters = [], {}
    for index, settings in enumerate(SETTINGS):
        made = peft.get_peft_model(quantised(bits), peft.LoraConfig(r=2, **settings)).eval()
        generator = torch.Generator().manual_seed(index)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.save_pretrained(tmp_path / str(index))
        theirs.append(made)
        adapters[str(index)] = peft_format.read(tmp_path / str(index))
    backbone = quantised(bits)
    layers = dict(backbone.named_modules())
    model = MultiExpertModel(backbone, adapters, XLoraConfig(layerwise=True)).eval()
    ids = torch.randint(3, 51, (2, 7), generator=torch.Generator().manual_seed(1)).to(model.device)
    with torch.no_grad():
        for index, one in enumerate(theirs):
            with model.fixed_routing({str(index): 1.0}):
                got, want = model(input_ids=ids).logits, one(input_ids=ids).logits
            torch.testing.assert_close(got, want, rtol=0, atol=(1e-4 if bits == 4 else 2e-2) * float(want.abs().max()))
        with model.experts_off():
            assert torch.equal(model(input_ids=ids).logits, quantised(bits)(input_ids=ids).logits)
    model(input_ids=ids).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.router.parameters())
    assert all(layer.base is layers[site] for site, layer in model.layers.items())
    copy.deepcopy(model.router)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weight_is_dequantised_and_the_dtype_known(bits):
    layer = quantised(bits, torch.bfloat16 if bits == 4 else torch.float32).model.layers[0].self_attn.q_proj
    assert kind_of(layer) == "linear"
    assert compute_dtype_of(layer) == (torch.bfloat16 if bits == 4 else torch.float32)
    units = torch.eye(64, device=layer.weight.device, dtype=compute_dtype_of(layer))
    want = (layer(units).float() - layer.bias.float()).T
    torch.testing.assert_close(dense_weight(layer), want, rtol=0, atol=1e-5)
