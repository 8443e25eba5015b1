"""Heads that were trained with an adapter, in PEFT's folders: PEFT gives our logits, and we give those of PEFT's."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from mole.adapters import attach, attach_weights, extract, files, peft_format
from mole.registry import ADAPTERS

TOKENS = torch.arange(1, 15).reshape(2, 7)
METHODS = ["dora", "ia3", "lora", "prefix", "prompt"]
THEIRS = {
    "ia3": IA3Config(task_type="SEQ_CLS", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "lora": LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]),
    "prefix": PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "prompt": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=32, pad_token_id=0, num_labels=3, **sizes)).eval()


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def logits(model):
    return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", METHODS)
def test_peft_gives_our_logits(model, tmp_path, name):
    plain = copy.deepcopy(model)
    attach(model, ADAPTERS[name].config(), seed=0, trained=["score"])
    wanted = logits(moved(model).eval())
    for file, data in files.dump(extract(model, full=["score"]), "x").items():
        (tmp_path / file).write_bytes(data)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, tmp_path).eval()), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", THEIRS)
def test_we_give_the_logits_of_pefts_folder(model, tmp_path, name):
    theirs = moved(get_peft_model(copy.deepcopy(model), THEIRS[name])).eval()
    theirs.save_pretrained(tmp_path)
    attach_weights(model, peft_format.read(tmp_path))
    torch.testing.assert_close(logits(model.eval()), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_written_is_read_back(model, name):
    attach(model, ADAPTERS[name].config(), seed=0, trained=["score"])
    adapter = extract(moved(model), full=["score"])
    read = files.parse(files.dump(adapter, "x"), "there").adapter
    assert read.full_names == ("score",)
    assert read.tensors().keys() == adapter.tensors().keys()
    assert all(torch.equal(tensor, read.tensors()[key]) for key, tensor in adapter.tensors().items())
