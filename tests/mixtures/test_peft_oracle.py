"""PEFT itself as the oracle: single experts equal PEFT's LoRA, the xlora router equals PEFT's X-LoRA."""

import warnings

import peft
import pytest
import torch
from mixture_cases import llama
from safetensors.torch import load_file

from mole.adapters import Adapter, LoraWeights
from mole.mixtures import MultiExpertModel
from mole.routers import UniformConfig, XLoraConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three LoRA folders saved by PEFT: plain, rsLoRA, and one of another rank and alpha."""
    made = []
    options = [{"r": 2, "lora_alpha": 8}, {"r": 3, "lora_alpha": 4, "use_rslora": True}, {"r": 5, "lora_alpha": 10}]
    for index, option in enumerate(options):
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **option))
        generator = torch.Generator().manual_seed(index)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        made.append(tmp_path_factory.mktemp("experts") / str(index))
        model.save_pretrained(made[-1])
    return made


def read(folder) -> Adapter:
    """The factors by PEFT's names, without mole's reader."""
    config = peft.LoraConfig.from_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            modules[path] = LoraWeights(A=a, B=b, alpha=float(config.lora_alpha), rslora=config.use_rslora)
    return Adapter(method="lora", modules=modules)


@pytest.fixture
def ids():
    return torch.randint(3, 101, (2, 9), generator=torch.Generator().manual_seed(1))


def test_one_hot_routing_equals_that_expert_alone_in_peft(folders, ids):
    model = MultiExpertModel(llama(), {str(i): read(f) for i, f in enumerate(folders)}, UniformConfig()).eval()
    for index, folder in enumerate(folders):
        oracle = peft.PeftModel.from_pretrained(llama(), folder).eval()
        with torch.no_grad(), model.fixed_routing({str(index): 1.0}):
            torch.testing.assert_close(model(input_ids=ids).logits, oracle(input_ids=ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layerwise": True, "temperature": 0.3},
        {"depth": 2, "size": 16, "layerwise": True},
        {"depth": 3, "size": 8, "top_k": 2},
        {"softmax": False, "global_scaling_weight": 1.7},
        {"scaling_pass_value": 0.7},
        {"top_k": 2, "top_k_softmax": True, "softmax": False},
    ],
    ids=str,
)
def test_xlora_equals_pefts(options, folders, ids):
    model = MultiExpertModel(llama(), {str(i): read(f) for i, f in enumerate(folders)}, XLoraConfig(**options)).eval()
    config = XLoraConfig(**options)
    base = llama(use_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about its settings
        oracle = peft.get_peft_model(
            base,
            peft.XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=32,
                adapters={str(i): str(f) for i, f in enumerate(folders)},
                xlora_depth=config.depth,
                xlora_size=config.size,
                layerwise_scalings=config.layerwise,
                enable_softmax=config.softmax,
                enable_softmax_topk=config.top_k_softmax,
                softmax_temperature=config.temperature,
                top_k_lora=config.top_k,
                scaling_pass_value=config.scaling_pass_value,
                global_scaling_weight=config.global_scaling_weight,
            ),
        ).eval()
    theirs = list(oracle.base_model.internal_xlora_classifier.parameters())
    generator = torch.Generator().manual_seed(3)
    for mine, other in zip(model.router.parameters(), theirs, strict=True):
        mine.data = 0.5 * torch.randn(mine.shape, generator=generator)
        other.data = mine.data.clone()
    want, got = oracle(input_ids=ids).logits, model(input_ids=ids).logits
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    want.square().mean().backward()
    got.square().mean().backward()
    for mine, other in zip(model.router.parameters(), theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4 * float(other.grad.abs().max()))
