"""Loading a backbone: from a folder, frozen, labelled; and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mole.backbones import PretrainedConfig, load, resolve_device
from mole.backbones.load import shapes_digest
from mole.backbones.tiny_backbone import FOLDER


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Llama with the tokenizer of the tiny backbone."""
    path = tmp_path_factory.mktemp("models") / "toy"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(FOLDER / name, path / name)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """The folder's files, to be damaged."""
    return shutil.copytree(folder, tmp_path / "toy")


def cpu(path, **options):
    return load(PretrainedConfig(path=str(path), device="cpu", **options))


def test_a_folder_loads_frozen_in_eval_mode_named_after_itself(folder):
    backbone = cpu(folder)
    assert backbone.name == "toy"
    assert backbone.revision is None
    assert backbone.context_length == 64
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert backbone.tokenizer("ab")["input_ids"][0] == backbone.tokenizer.bos_token_id


def test_weights_are_those_of_the_file_in_the_dtype_asked_for(folder):
    stored = load_file(folder / "model.safetensors")
    model = cpu(folder, dtype="bfloat16").model
    for name, weight in model.state_dict().items():
        assert weight.dtype is torch.bfloat16
        assert torch.equal(weight, stored[name].bfloat16())
    assert cpu(folder).model.dtype is torch.float32


def test_attention_implementations_give_the_same_logits(folder):
    ids = torch.tensor([[1, 40, 50, 60]])
    eager = cpu(folder, attention="eager").model
    sdpa = cpu(folder, attention="sdpa").model
    assert eager.config._attn_implementation == "eager"
    assert sdpa.config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager(input_ids=ids).logits, sdpa(input_ids=ids).logits, atol=1e-6, rtol=0)


def test_the_shapes_digest_depends_on_shapes_and_not_on_weights_or_dtype(folder):
    model = cpu(folder).model
    assert shapes_digest(model) == cpu(folder, dtype="bfloat16").shapes
    wider = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "intermediate_size": 32}))
    assert shapes_digest(wider) != shapes_digest(model)


def test_a_tokenizer_without_padding_pads_with_its_end_token(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = cpu(copy).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_missing_folder_is_told_from_a_hub_id(tmp_path):
    with pytest.raises(ValueError, match="no such folder, and not a Hub id"):
        cpu(tmp_path / "nothing")


def test_a_file_in_place_of_a_folder_is_refused(folder):
    with pytest.raises(ValueError, match="is a file; name the folder"):
        cpu(folder / "config.json")


def test_a_folder_without_config_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        cpu(copy)


def test_pickled_weights_are_never_read(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors; .* not read"):
        cpu(copy)


def test_damaged_weights_are_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="the weights are damaged"):
        cpu(copy)


def test_a_missing_weight_is_refused_and_named(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        cpu(copy)


def test_a_missing_tokenizer_is_refused(copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        cpu(copy)


def test_a_revision_of_a_folder_is_refused(folder):
    with pytest.raises(ValueError, match="which has no revisions"):
        cpu(folder, revision="main")


def test_the_cpu_and_auto_are_always_there():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps", "xpu")


@pytest.mark.parametrize("name", ["cuda:99", "mps:7", "toaster", "cpu:3"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match=rf"device={name}: no such device here \(known: cpu.*use device=auto"):
        resolve_device(name)


def test_a_device_that_is_no_name_is_refused():
    with pytest.raises(ValueError, match="not a device"):
        resolve_device("cuda 1")
