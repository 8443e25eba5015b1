"""Adapters with more than two factors of linear modules: PEFT's folders are read, and written again, bit for bit."""

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification, ViTConfig, ViTForImageClassification

from mole.adapters import Adapter, LoraWeights, attach_weights, peft_format
from mole.untrusted import Damaged

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


def classifier():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, num_labels=3, pad_token_id=0, attention_bias=True, **SIZES)
    return LlamaForSequenceClassification(config).eval()


def vision():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=2, **SIZES)).eval()


CASES = {
    "dora": ("llama", {"r": 2, "target_modules": ["q_proj"], "use_dora": True}),
    "lora_bias": ("llama", {"r": 2, "target_modules": ["q_proj"], "lora_bias": True}),
    "embedding and head": ("llama", {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "all biases": ("gpt2", {"r": 2, "target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "biases of the adapted": (
        "gpt2",
        {"r": 2, "target_modules": ["c_attn"], "bias": "lora_only", "use_dora": True, "fan_in_fan_out": True},
    ),
    "a head": ("classifier", {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "a head and all biases": (
        "classifier",
        {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS", "bias": "all"},
    ),
    "a convolution": ("vision", {"r": 2, "target_modules": ["projection", "q_proj"], "lora_bias": True}),
    "a convolution and a head": (
        "vision",
        {"r": 2, "target_modules": ["projection"], "modules_to_save": ["classifier"]},
    ),
}


def saved_by_peft(model, folder, **settings):
    """PEFT's model with every trained tensor random, saved in `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
        made.save_pretrained(folder)
    return made


@pytest.fixture(params=CASES)
def case(request, llama, gpt2, tmp_path):
    """(the untouched backbone, PEFT's model, its folder)."""
    kind, settings = CASES[request.param]
    model = {"llama": llama, "gpt2": gpt2}.get(kind) or {"classifier": classifier, "vision": vision}[kind]()
    folder = tmp_path / "peft"
    return copy.deepcopy(model), saved_by_peft(model, folder, **settings), folder


def test_written_again_the_tensors_are_those_of_peft_bit_for_bit(case):
    folder = case[2]
    files = peft_format.dump(peft_format.read(folder), "user/model")
    (folder / "again.safetensors").write_bytes(files["adapter_model.safetensors"])
    theirs, ours = load_file(folder / "adapter_model.safetensors"), load_file(folder / "again.safetensors")
    assert set(ours) == {name for name in theirs if ".original_module." not in name}
    assert all(
        torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype for name, tensor in ours.items()
    )


def test_peft_loads_what_was_written_again_with_equal_logits(case, tmp_path):
    plain, theirs, folder = case
    (tmp_path / "ours").mkdir()
    peft_format.write(peft_format.read(folder), tmp_path / "ours", "user/model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    generator = torch.Generator().manual_seed(2)
    inputs = {"input_ids": torch.randint(1, 32, (2, 7), generator=generator)}
    if plain.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    with torch.no_grad():
        want = theirs(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, want, rtol=0, atol=1e-5)
        assert (plain(**inputs).logits - want).abs().max() > 1e-4


def test_reading_what_was_written_gives_the_same_bytes(case):
    once = peft_format.dump(peft_format.read(case[2]), "user/model")
    assert peft_format.dump(peft_format.parse(*once.values(), "x").adapter, "user/model") == once


def test_all_that_was_trained_is_counted(case):
    _, theirs, folder = case
    trained = {id(p): p.numel() for n, p in theirs.named_parameters() if p.requires_grad and "original_module" not in n}
    assert peft_format.read(folder).parameters() == sum(trained.values())


def test_what_holds_more_than_lora_and_dora_of_linear_modules_cannot_be_trained_further_alone(case, request):
    plain, theirs, folder = case
    if request.node.callspec.params["case"] in ("dora", "a head"):
        attach_weights(plain, peft_format.read(folder))
        ids = torch.arange(1, 15).reshape(2, 7)
        torch.testing.assert_close(plain(ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=1e-5)
        return
    with pytest.raises(ValueError, match="works in a mixture"):
        attach_weights(plain, peft_format.read(folder))


M = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
DAMAGES = {
    "one magnitude is missing": (lambda t: t.pop(M), "q_proj has no magnitude"),
    "another length": (lambda t: t.update({M: torch.ones(5)}), "magnitude of shape"),
    "not finite": (lambda t: t[M].__setitem__(0, float("nan")), "not finite"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_magnitude_that_does_not_fit_is_an_error_that_names_it(llama, tmp_path, name):
    saved_by_peft(llama, tmp_path, **CASES["dora"][1])
    change, message = DAMAGES[name]
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(Damaged, match=message):
        peft_format.read(tmp_path)


def test_a_magnitude_at_some_modules_only_cannot_be_written(tmp_path):
    plain = LoraWeights(A=torch.ones(1, 4), B=torch.ones(4, 1), alpha=1.0)
    dora = LoraWeights(A=torch.ones(1, 4), B=torch.ones(4, 1), alpha=1.0, magnitude=torch.ones(4))
    with pytest.raises(ValueError, match="a magnitude at some of its modules only"):
        peft_format.write(Adapter("lora", {"a": plain, "b": dora}), tmp_path, None)


@pytest.mark.parametrize(
    ("A", "B", "more"),
    [
        ((2, 4), (4, 3), {}),
        ((2, 4), (4, 2, 1), {}),
        ((2, 4, 3), (4, 2, 3), {}),
        ((3, 4, 3), (4, 2, 1), {}),
        ((2, 4, 1), (4, 2, 1), {"embedding": True}),
        ((2, 4), (4, 2), {"magnitude": torch.ones(3)}),
        ((2, 4), (4, 2), {"bias": torch.ones(2)}),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(A, B, more):
    with pytest.raises(ValueError, match="of shape"):
        LoraWeights(A=torch.ones(A), B=torch.ones(B), alpha=1.0, **more)
