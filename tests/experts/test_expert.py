import json
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mole.adapters import Adapter, LoraWeights, peft_format
from mole.experts import (
    BackboneRef,
    Damaged,
    Expert,
    LibraryError,
    Refused,
    describe,
    load_expert,
    read_card,
    write_card,
)

FILES = {"expert.json", "README.md", "adapter_config.json", "adapter_model.safetensors"}


def same(one: Adapter, two: Adapter) -> bool:
    a, b = one.tensors(), two.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_expert_survives_its_folder(expert, tmp_path):
    expert.save(tmp_path / "x")
    again = load_expert(tmp_path / "x")
    assert again.card == expert.card
    assert same(again.adapter, expert.adapter)
    assert {path.name for path in (tmp_path / "x").iterdir()} == FILES


def test_equal_adapters_have_equal_contents(make):
    assert make(0).card.content == make(0, tags=["other"]).card.content != make(1).card.content


def test_the_card_sums_the_adapter_up(expert):
    assert expert.card.adapter == {
        "method": "lora",
        "rank": 2,
        "alpha": 4.0,
        "targets": ["q_proj", "v_proj"],
        "full_modules": [],
        "parameters": 4 * (2 * 6 + 4 * 2),
        "dtype": "float32",
    }


def test_a_folder_copied_by_an_expert_that_was_loaded_has_the_same_bytes(expert, tmp_path):
    expert.save(tmp_path / "x")
    load_expert(tmp_path / "x").save(tmp_path / "y")
    for name in FILES:
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_weights_are_read_when_they_are_asked_for(expert, tmp_path):
    expert.save(tmp_path / "x")
    loaded = load_expert(tmp_path / "x")
    path = tmp_path / "x" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert loaded.card == expert.card
    with pytest.raises(Damaged, match=r"adapter_model\.safetensors is not what the card says: .* bytes instead of"):
        _ = loaded.adapter


def test_the_folder_of_a_run_is_taken_for_its_expert(expert, tmp_path):
    expert.save(tmp_path / "run" / "expert")
    (tmp_path / "run" / "run.json").write_text("{}")
    assert load_expert(tmp_path / "run").card == expert.card


def test_a_folder_is_written_whole_or_not_at_all(expert, tmp_path, monkeypatch):
    def fail(card, folder):
        raise OSError("full")

    monkeypatch.setattr("mole.experts.folder.write_card", fail)
    with pytest.raises(OSError, match="full"):
        expert.save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_is_not_overwritten(expert, tmp_path):
    (tmp_path / "x").mkdir()
    expert.save(tmp_path / "x")
    with pytest.raises(FileExistsError, match="choose a new folder"):
        expert.save(tmp_path / "x")


def test_an_adapter_that_changed_after_its_card_was_made_is_not_saved(expert, tmp_path):
    next(iter(expert.adapter.modules.values())).A.add_(1)
    with pytest.raises(LibraryError, match="has changed since its card was made"):
        expert.save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def make_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=32, **sizes)).eval()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_an_experts_folder_is_a_plain_peft_folder(tmp_path):
    path = "model.layers.0.mlp.up_proj"
    weights = LoraWeights(A=torch.randn(3, 16), B=torch.randn(24, 3), alpha=2.0)
    adapter = Adapter("lora", {path: weights}, targets=("up_proj",))
    Expert(describe(adapter, BackboneRef("user/llama")), adapter).save(tmp_path / "x")
    theirs = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "x")
    x = torch.randn(5, 16)
    expected = make_llama().get_submodule(path)(x) + 2 / 3 * x @ weights.A.T @ weights.B.T
    torch.testing.assert_close(theirs.base_model.model.get_submodule(path)(x), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("base", "label"), [("user/llama", "user/llama"), ("/home/me/models/llama", "llama"), (None, "unknown")]
)
def test_a_folder_that_peft_saved_becomes_an_expert(tmp_path, base, label):
    made = peft.get_peft_model(make_llama(), peft.LoraConfig(r=2, target_modules="all-linear"))
    made.save_pretrained(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    (tmp_path / "x" / "README.md").write_text("theirs")
    expert = load_expert(tmp_path / "x")
    assert expert.card.backbone == BackboneRef(label)
    assert expert.card.derived_from[0]["relation"] == "imported"
    expert.save(tmp_path / "y")
    assert same(load_expert(tmp_path / "y").adapter, peft_format.read(tmp_path / "x"))


@pytest.mark.parametrize("entry", ["notes.txt", ".DS_Store", "evil.py", "adapter_model.bin", "sub", "link", "fifo"])
def test_a_folder_with_anything_else_in_it_is_refused(expert, tmp_path, entry):
    import os

    expert.save(tmp_path / "x")
    place = tmp_path / "x" / entry
    if entry == "sub":
        place.mkdir()
    elif entry == "link":
        place.symlink_to(tmp_path)
    elif entry == "fifo":
        os.mkfifo(place)
    else:
        place.write_text("")
    with pytest.raises(Refused, match=entry.split(".")[-1]):
        load_expert(tmp_path / "x")


def reseal(folder, **changes):
    """Writes the card anew, with digests that fit what lies in the folder."""
    from mole.experts.card import file_facts

    card = read_card(folder)
    files = {name: file_facts(folder / name) for name in card.files}
    write_card(card.edited(files=files, **changes), folder)


def test_damaged_weights_under_a_card_that_fits_are_told(expert, tmp_path):
    expert.save(tmp_path / "x")
    path = tmp_path / "x" / "adapter_model.safetensors"
    path.write_bytes(b"<html>404</html>")
    reseal(tmp_path / "x")
    with pytest.raises(Damaged, match="not a safetensors file, or a damaged one"):
        _ = load_expert(tmp_path / "x").adapter


def test_a_card_that_tells_of_another_rank_is_damage(expert, tmp_path):
    expert.save(tmp_path / "x")
    reseal(tmp_path / "x", adapter={**expert.card.adapter, "rank": 64})
    with pytest.raises(Damaged, match=r"summary does not fit the files \(adapter\.rank\)"):
        _ = load_expert(tmp_path / "x").adapter


def test_a_mixture_is_no_expert(tmp_path):
    from mole.experts import make_card

    (tmp_path / "mixture.json").write_text("{}")
    write_card(make_card(tmp_path, BackboneRef("m"), kind="mixture"), tmp_path)
    with pytest.raises(LibraryError, match="is a mixture, not an expert"):
        load_expert(tmp_path)


@pytest.mark.parametrize("place", ["empty", "nowhere/x", "nowhere"])
def test_where_no_expert_is_the_error_says_what_could_be_there(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LibraryError, match=r"neither expert\.json nor adapter_config\.json|no library there"):
        load_expert(str(tmp_path / place))


def test_an_expert_goes_to_another_place_and_is_still_the_same(expert, tmp_path):
    expert.save(tmp_path / "x")
    shutil.move(tmp_path / "x", tmp_path / "y")
    assert same(load_expert(tmp_path / "y").adapter, expert.adapter)


def test_the_readme_shows_texts_of_the_card_as_text(make, tmp_path):
    nasty = "[click](http://x) <script>alert(1)</script> | `x` ${HOME}"
    expert = make(description=nasty, tasks=[nasty])
    expert.save(tmp_path / "x")
    text = (tmp_path / "x" / "README.md").read_text()
    assert "<script>" not in text
    assert "[click]" not in text.replace("\\[", "")
    assert all(line.count("|") - line.count("\\|") == 3 for line in text.splitlines() if line.startswith("| "))


def test_nothing_of_cards_and_libraries_needs_torch():
    code = "import sys, mole.experts, mole.commands.library.list; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
