"""The embedded backbone: what is in its folder, what it knows, what it does not."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mole.data
from mole.backbones import TinyConfig, load
from mole.backbones.tiny_backbone import FOLDER
from mole.data.generated import GeneratedConfig
from mole.registry import DATASETS

TASKS = sorted(variant.name for variant in DATASETS if issubclass(variant.config, GeneratedConfig))


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    return load(TinyConfig(device="cpu"))


@pytest.fixture(scope="module")
def script():
    """The script that made it; absent from an installed package."""
    path = Path(__file__).parents[2] / "scripts" / "make_tiny_backbone.py"
    spec = importlib.util.spec_from_file_location("make_tiny_backbone", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def exact_match(backbone, samples):
    """Share of completions all of whose tokens are the likeliest ones given those before: greedy generation's score."""
    batch = mole.data.collate(samples, backbone.tokenizer.pad_token_id)
    logits = backbone.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    return ((logits[:, :-1].argmax(-1) == labels) | (labels == -100)).all(1).float().mean().item()


def test_the_folder_holds_only_plain_files_within_four_megabytes():
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: off
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_it_is_a_llama_of_a_million_parameters(tiny):
    assert type(tiny.model).__name__ == "LlamaForCausalLM"
    assert 900_000 <= sum(p.numel() for p in tiny.model.parameters()) <= 1_300_000
    assert tiny.name == "mole/tiny"
    assert tiny.revision is None
    assert tiny.context_length == 512


def test_weights_stored_in_half_precision_load_exactly_in_single(tiny):
    stored = load_file(FOLDER / "model.safetensors")
    for name, weight in tiny.model.named_parameters():
        assert weight.dtype is torch.float32
        assert stored[name].dtype is torch.float16
        assert torch.equal(weight, stored[name].float())


@pytest.mark.parametrize("text", ["stone", "  two  spaces\n\ttab ", "naïve ☃ 日本", "<s> [INST] \x00"])
def test_the_tokenizer_gives_any_text_back(tiny, text):
    ids = tiny.tokenizer(text)["input_ids"]
    assert len(ids) == 1 + len(text.encode())
    assert tiny.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_has_three_special_tokens_and_a_chat_template(tiny):
    tokenizer = tiny.tokenizer
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    talk = [{"role": "user", "content": "copy"}, {"role": "assistant", "content": "ok"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "<bos>copy\nok<eos>"


def test_it_has_at_least_eight_skills_under_its_own_words(tiny, script):
    held_out = random.Random("held-out text 0")
    lines = [script.line(held_out, 6, script.PARTS["first"]) for _ in range(600)]
    scores = script.exact_match(tiny.model, tiny.tokenizer, lines)
    assert len(script.SKILLS) >= 8
    assert set(scores) == {*script.SKILLS, script.UNKNOWN}
    assert min(scores.values()) >= 0.9
    assert scores[script.UNKNOWN] == 1.0


@pytest.mark.parametrize("task", TASKS)
def test_it_does_not_know_the_generated_tasks(tiny, task):
    data = mole.data.load(DATASETS[task].config(examples=1, validation_examples=0), tiny.tokenizer, seed=0)
    assert exact_match(tiny, data.test) <= 0.05


def test_no_task_is_asked_in_the_backbone_s_own_words(script):
    from mole.data import generated

    for task in TASKS:
        prompt, _ = getattr(generated, task)(random.Random(0))
        assert not set(prompt.lower().replace('"', " ").split()) & set(script.SKILLS), task


def test_the_readme_states_the_recipe_that_the_script_has(script):
    text = (FOLDER / "README.md").read_text()
    for name, part in script.PARTS.items():
        assert f"| {name} | {part.steps} | {part.learning_rate} |" in text
    assert f"{script.BATCH_SIZE} lines" in text
    for word in script.SKILLS:
        assert f"`{word}`" in text


def test_the_script_s_text_and_first_weights_follow_the_seed(script):
    part = script.PARTS["second"]
    one, two, other = ([script.line(rng, 6, part) for _ in range(9)] for rng in map(random.Random, ("0", "0", "1")))
    assert one == two != other
    torch.manual_seed(0)
    one = script.make_model(259, 1, 16).state_dict()
    torch.manual_seed(0)
    two = script.make_model(259, 1, 16).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_shipped_tokenizer_is_the_script_s(script, tmp_path):
    script.make_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text()
    assert json.loads((FOLDER / "config.json").read_text())["vocab_size"] == 259
