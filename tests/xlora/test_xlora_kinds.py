"""Experts of every kind through the API: made by PEFT, mixed, saved with their own bits, loaded with equal logits."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
from xlora_cases import ids, llama, randomise

from mole import xlora

KINDS = {
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "biases of their own": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "plain": {"target_modules": ["v_proj"], "use_rslora": True},
}


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = llama().config
    config.num_labels = 3
    return LlamaForSequenceClassification(config).eval()


def made_by_peft(folder: Path, make, seed: int, **options) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about biases that cannot be merged
        model = peft.get_peft_model(make(), peft.LoraConfig(r=2, lora_alpha=3, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("lora_A", "lora_B", "lora_embedding", "modules_to_save")):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about embeddings that it saves or not
        model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def assert_own_bits(source: str, copied: Path) -> None:
    want, got = load_file(Path(source) / "adapter_model.safetensors"), load_file(copied / "adapter_model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)


@torch.no_grad()
def logits(model):
    return model(input_ids=ids()).logits


def test_experts_of_all_kinds_are_saved_and_loaded_bit_for_bit(tmp_path):
    adapters = {
        name: made_by_peft(tmp_path / f"in-{index}", llama, index, task_type="CAUSAL_LM", **options)
        for index, (name, options) in enumerate(KINDS.items())
    }
    config = xlora.xLoRAConfig(layerwise_scalings=True, top_k_lora=3)
    model = randomise(xlora.add_xlora_to_model(llama(), config, adapters))
    want = logits(model)
    model.save_pretrained(tmp_path / "x")
    card = json.loads((tmp_path / "x" / "mole_xlora.json").read_text())
    assert card["peft_layout"]["written"] is False
    for row in card["experts"]:
        assert_own_bits(adapters[row["name"]], tmp_path / "x" / row["folder"])
    assert torch.equal(logits(xlora.from_pretrained(tmp_path / "x", llama())), want)
    assert not torch.allclose(want, logits(llama()), atol=1e-2)


def test_embedding_experts_are_pefts_and_peft_loads_them(tmp_path):
    options = {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "q_proj"]}
    adapters = {str(i): made_by_peft(tmp_path / f"in-{i}", llama, i, **options) for i in range(2)}
    config = xlora.xLoRAConfig(layerwise_scalings=True)
    model = randomise(xlora.add_xlora_to_model(llama(), config, adapters))
    model.save_pretrained(tmp_path / "x", layouts=("xlora", "peft"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(llama(use_cache=False), tmp_path / "x").eval()
    want = logits(theirs)
    assert (logits(model) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("policy", ["error", "base", "take:second", "mean", "mix", "train", "train:first"])
def test_heads_of_experts_follow_the_policy_and_come_back(policy, tmp_path):
    adapters = {
        name: made_by_peft(tmp_path / name, classifier, seed, task_type="SEQ_CLS", target_modules=["v_proj"])
        for seed, name in enumerate(("first", "second"))
    }
    config = xlora.xLoRAConfig(modules_to_save=policy)
    base = classifier()
    if policy == "error":
        with pytest.raises(ValueError, match=r"'first'.*score.*modules_to_save=base"):
            xlora.add_xlora_to_model(base, config, adapters)
        return
    model = randomise(xlora.add_xlora_to_model(base, config, adapters))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "router" not in name]
    assert bool(trained) == policy.startswith("train")
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.data.add_(0.5)
    want = logits(model)
    model.save_pretrained(tmp_path / "x")
    assert (tmp_path / "x" / "modules_to_save.safetensors").is_file() == policy.startswith("train")
    for name in adapters:
        assert_own_bits(adapters[name], tmp_path / "x" / name)
    assert torch.equal(logits(xlora.from_pretrained(tmp_path / "x", classifier())), want)
    if policy.startswith("train"):
        path = tmp_path / "x" / "modules_to_save.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(ValueError, match="modules_to_save.safetensors: expected the file"):
            xlora.from_pretrained(tmp_path / "x", classifier())


def test_load_model_loads_a_classifier_with_its_head(tmp_path):
    base = tmp_path / "base"
    classifier().save_pretrained(base)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "once": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(base)
    options = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"]}  # PEFT trains the head along
    adapters = {name: made_by_peft(tmp_path / name, classifier, seed, **options) for seed, name in enumerate("ab")}
    fields = {"xlora_depth": 1, "modules_to_save": "mean", "adapters": adapters}
    config = xlora.xLoRAConfig(32, base_model_id=str(base), **fields)
    model = randomise(xlora.add_xlora_to_model(classifier(), config))
    model.save_pretrained(tmp_path / "x")
    loaded, _ = xlora.xlora_utils.load_model(str(tmp_path / "x"), "cpu", torch.float32)
    assert logits(loaded).shape == (len(ids()), 3)
    assert torch.equal(logits(loaded), logits(model))


def cpu_offloaded(base, folder):
    cpu_offload(base, execution_device=torch.device("cpu"))


def disk_offloaded(base, folder):
    disk_offload(base, str(folder), execution_device=torch.device("cpu"))


def partly_offloaded(base, folder):
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "model.layers.0": "cpu"}
    dispatch_model(base, {**parts, "model.layers.1": "disk", "lm_head": "disk"}, main_device="cpu", offload_dir=folder)


@pytest.mark.filterwarnings("ignore:.*offloaded")
@pytest.mark.parametrize("offload", [cpu_offloaded, disk_offloaded, partly_offloaded])
def test_an_offloaded_base_gives_the_same_logits_tokens_and_files(offload, tmp_path):
    adapters = {
        name: made_by_peft(tmp_path / name, llama, index, task_type="CAUSAL_LM", **KINDS[kind])
        for index, (name, kind) in enumerate(
            [("a", "plain"), ("b", "embedding and head"), ("c", "biases of their own")]
        )
    }
    config = xlora.xLoRAConfig(layerwise_scalings=True)
    there = randomise(xlora.add_xlora_to_model(llama(), config, adapters))
    base = llama()
    offload(base, tmp_path / "offloaded")
    assert any(parameter.device.type == "meta" for parameter in base.parameters())
    model = randomise(xlora.add_xlora_to_model(base, config, adapters))
    assert model.device.type == "cpu"
    assert torch.equal(logits(model), logits(there))
    assert torch.equal(*(one.generate(ids(), max_new_tokens=4, do_sample=False) for one in (model, there)))
    model.save_pretrained(tmp_path / "x")
    assert torch.equal(logits(xlora.from_pretrained(tmp_path / "x", llama())), logits(there))
    model.unload()
    dora = {"d": made_by_peft(tmp_path / "d", llama, 0, task_type="CAUSAL_LM", **KINDS["dora"])}
    with pytest.raises(ValueError, match=r"expert 'd' at model\.layers\..*which are offloaded"):
        xlora.add_xlora_to_model(base, config, dora)
