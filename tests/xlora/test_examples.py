"""The README's X-LoRA examples run as they stand there, one after another, on a small model with these names."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from xlora_cases import llama, lora, write_expert

import mole
from mole import xlora
from mole.analysis import plot_run

ROOT = Path(mole.__file__).parent.parent
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="no README beside an installed package")
WORDS = ("once", "upon", "a", "time", "there", "was", "law")


def blocks() -> list[str]:
    section = README.read_text(encoding="utf-8").split("## X-LoRA, under its own names")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """backbone/ and experts/ of the examples, as the working directory."""
    llama().save_pretrained(tmp_path / "backbone")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: index + 3 for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", model_input_names=["input_ids"])
    fast.save_pretrained(tmp_path / "backbone")
    for index, name in enumerate(("law", "code", "bio")):
        write_expert(tmp_path / "experts" / name, lora(index))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_examples_run_in_order_and_do_what_they_say(workplace, capsys):
    convert, load, generate, change = blocks()
    names = {"texts": ["once upon a time", "there was a law"]}
    exec(convert, names)
    assert "trainable params: 3,282" in capsys.readouterr().out.replace("\n", " ")
    assert {path.name for path in (workplace / "trained").iterdir()} >= {"law", "code", "bio", "mole_xlora.json"}
    trained = names["model"].eval()
    ids = torch.tensor([[3, 4, 5]])
    exec(load, names)
    loaded = names["model"]
    assert loaded is not trained
    assert torch.equal(loaded(ids).logits, trained(ids).logits)
    exec(generate, names)
    assert names["tokens"].shape[1] > 2
    assert names["log"][0].shape == (1, 1, 2, 6, 3)
    assert all(entry.shape == (1, 1, 1, 6, 3) for entry in names["log"][1:])
    exec(change, names)
    assert loaded.get_topk_lora() == 2
    assert loaded.xlora_config.scaling_pass_value == pytest.approx(1 / 3)
    assert loaded.get_nb_trainable_parameters()[0] > 3282
    with contextlib.suppress(ImportError):
        import matplotlib  # noqa: F401

        assert plot_run("looked-at")
    early = xlora.from_pretrained("trained", llama(), "cpu")
    assert torch.equal(early(ids).logits, trained(ids).logits)


def test_a_pickle_becomes_safetensors_in_a_script_of_its_own(tmp_path):
    script = ROOT / "scripts" / "pickle_to_safetensors.py"
    if not script.is_file():
        pytest.skip("no scripts beside an installed package")
    weights = {"last.weight": torch.ones(3, 4), "last.bias": torch.zeros(3)}
    torch.save(weights, tmp_path / "xlora_classifier.pt")
    torch.save({"deep": weights}, tmp_path / "nested.pt")
    run = [sys.executable, str(script)]
    subprocess.run([*run, str(tmp_path / "xlora_classifier.pt"), str(tmp_path / "out")], check=True)
    from safetensors.torch import load_file

    got = load_file(tmp_path / "out" / "xlora_classifier.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in weights.items())
    assert "last.weight" in (tmp_path / "out" / "source.json").read_text()
    refused = subprocess.run([*run, str(tmp_path / "nested.pt"), str(tmp_path / "out")], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "not a flat dict" in refused.stderr


def test_nothing_in_mole_opens_a_pickle():
    for file in Path(mole.__file__).parent.rglob("*.py"):
        assert "torch.load" not in file.read_text(encoding="utf-8"), file
