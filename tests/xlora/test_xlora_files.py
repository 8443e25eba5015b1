"""What is saved loads again with equal bits, wherever the folder goes; a failed save changes nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from xlora_cases import SITES, build, ids, llama, logits, lora, randomise, write_expert, write_experts

from mole import xlora

NAMES = ["0", "1.5", "lora_A", "weight", "a/b", "über·专家", "..", "CON", "Law", "law", "adapters", "expert-3"]


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


EXPERT = ("adapter_config.json", "adapter_model.safetensors")
ROOT = {"mole_xlora.json", "xlora_config.json", "xlora_classifier.safetensors", "README.md", *EXPERT}


def test_the_files_are_these(saved):
    assert files(saved) == ROOT | {f"{name}/{file}" for name in ("law", "code", "bio") for file in EXPERT}


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
@pytest.mark.parametrize("layerwise", [False, True])
def test_loaded_logits_and_gates_are_equal_bit_for_bit(depth, layerwise, folders, tmp_path):
    relu = depth != 3
    fields = {"xlora_depth": depth, "xlora_size": 8, "layerwise_scalings": layerwise, "enable_relu_and_dropout": relu}
    model = build(folders, **fields, use_bias=depth != 2, top_k_lora=2)
    want = logits(model)
    model.save_pretrained(tmp_path / "a", layouts=("xlora",))
    shutil.move(tmp_path / "a", tmp_path / "b")
    loaded = xlora.from_pretrained(tmp_path / "b", llama())
    assert torch.equal(logits(loaded), want)
    assert torch.equal(loaded.get_latest_gates(), model.get_latest_gates())
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert not any(module.training for module in loaded.modules())


def test_any_names_come_back_in_order(tmp_path):
    experts = {name: lora(index, targets=("q_proj",)) for index, name in enumerate(NAMES)}
    model = randomise(xlora.XLoraModel(llama(), xlora.xLoRAConfig(), experts))
    model.save_pretrained(tmp_path / "x")
    folders = [row["folder"] for row in json.loads((tmp_path / "x" / "mole_xlora.json").read_text())["experts"]]
    assert folders[0:4] == NAMES[0:4]
    assert folders[4:] == [f"expert-{index}" for index in range(4, 12)]
    loaded = xlora.from_pretrained(tmp_path / "x", llama())
    assert list(loaded.experts) == NAMES
    assert torch.equal(logits(loaded), logits(model))


def test_a_new_process_gives_the_same_bits(saved, model, tmp_path):
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from xlora_cases import llama, logits
from mole import xlora
torch.set_num_threads(1)
model = xlora.from_pretrained(sys.argv[2], llama())
torch.save((logits(model), model.get_latest_gates(), model.get_nb_trainable_parameters()), sys.argv[3])
"""
    out = tmp_path / "out.pt"
    subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent), str(saved), str(out)], check=True)
    got, gates, counts = torch.load(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(logits(model), got)
    torch.set_num_threads(threads)
    assert torch.equal(model.get_latest_gates(), gates)
    assert counts == model.get_nb_trainable_parameters()


def test_frozen_experts_are_saved_with_their_own_bits_on_a_base_of_another_dtype(tmp_path):
    sources = write_experts(tmp_path)
    model = xlora.add_xlora_to_model(llama(torch.bfloat16), xlora.xLoRAConfig(), sources)
    model.save_pretrained(tmp_path / "x")
    half = write_expert(tmp_path / "half", lora(4, dtype=torch.bfloat16))
    upcast = xlora.add_xlora_to_model(llama(), xlora.xLoRAConfig(), {"half": half})
    upcast.save_pretrained(tmp_path / "y")
    pairs = [(sources[name], tmp_path / "x" / name) for name in sources] + [(half, tmp_path / "y" / "half")]
    for source, copied in pairs:
        want, got = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (source, copied))
        assert want.keys() == got.keys()
        assert all(torch.equal(want[key], got[key]) and want[key].dtype == got[key].dtype for key in want)


def test_trained_experts_are_saved_and_come_back_without_arguments(folders, tmp_path):
    model = build(folders, use_trainable_adapters=True)
    for name, parameter in model.named_parameters():
        if name.endswith(".bank.B"):
            parameter.data.mul_(1.5)
    want = logits(model)
    for step in ("a", "b"):  # a second save must not go back to the sources
        model.save_pretrained(tmp_path / step)
        model = xlora.from_pretrained(tmp_path / step, llama())
        assert torch.equal(logits(model), want)
        assert model.get_use_trainable_adapters()
    assert not torch.allclose(logits(build(folders)), want)


def test_experts_trained_for_a_while_are_saved_as_they_are(folders, tmp_path):
    model = build(folders)
    model.set_use_trainable_adapters(True)
    next(iter(model.layers.values())).bank.B.data.mul_(2)
    model.set_use_trainable_adapters(False)
    with pytest.raises(ValueError, match="experts were trainable"):
        model.save_pretrained(tmp_path / "x", experts="reference")
    model.save_pretrained(tmp_path / "x")
    assert torch.equal(logits(xlora.from_pretrained(tmp_path / "x", llama())), logits(model))


def test_references_name_the_sources_and_check_them(tmp_path):
    sources = write_experts(tmp_path)
    model = build(sources)
    model.save_pretrained(tmp_path / "x", experts="reference")
    assert files(tmp_path / "x") == ROOT
    loaded = xlora.from_pretrained(tmp_path / "x", llama())
    assert torch.equal(logits(loaded), logits(model))
    config = Path(sources["code"]) / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    with pytest.raises(ValueError, match=r"expert 'code'.*changed.*adapters="):
        xlora.from_pretrained(tmp_path / "x", llama())
    xlora.from_pretrained(tmp_path / "x", llama(), adapters=sources)
    made_here = xlora.XLoraModel(llama(), xlora.xLoRAConfig(), {"e": lora()})
    with pytest.raises(ValueError, match="'e' was read from no file"):
        made_here.save_pretrained(tmp_path / "y", experts="reference")


@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16), lambda m: m.half().float(), lambda m: m.bfloat16().half()]
)
def test_frozen_experts_are_saved_with_their_own_bits_from_a_model_that_was_rounded(folders, tmp_path, move):
    model = build(folders)
    move(model).save_pretrained(tmp_path / "x")
    for name, folder in folders.items():
        own, saved = (load_file(Path(f) / "adapter_model.safetensors") for f in (folder, tmp_path / "x" / name))
        assert own.keys() == saved.keys()
        assert all(saved[key].dtype == own[key].dtype and torch.equal(saved[key], own[key]) for key in own)


def test_trained_experts_are_saved_as_the_model_holds_them_after_rounding(folders, tmp_path):
    model = build(folders, use_trainable_adapters=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "x")
    saved = load_file(tmp_path / "x" / "law" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_a_float64_router_keeps_its_bits(folders, tmp_path):
    model = build(folders, llama(torch.float64), router_dtype="float64")
    model.save_pretrained(tmp_path / "x")
    assert torch.equal(logits(xlora.from_pretrained(tmp_path / "x", llama(torch.float64))), logits(model))
    card = json.loads((tmp_path / "x" / "mole_xlora.json").read_text())
    assert card["router"]["dtype"] == "float64"
    assert card["peft_layout"]["written"] is False


def test_settings_changed_later_are_saved(model, tmp_path):
    model.set_topk_lora(2)
    model.set_scaling_pass_value(None)
    model.set_global_scaling_weight(0.5)
    model.save_pretrained(tmp_path / "x")
    loaded = xlora.from_pretrained(tmp_path / "x", llama())
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.xlora_config.top_k_lora == 2


# ---- the original's and mistral.rs's files
def test_the_originals_files_have_its_keys_and_nothing_else(saved):
    config = json.loads((saved / "xlora_config.json").read_text())
    assert config["adapters"] == ["law", "code", "bio"]
    assert set(config) == {
        *("hidden_size", "base_model_id", "adapters", "enable_softmax", "enable_softmax_topk", "layerwise_scalings"),
        *("xlora_depth", "xlora_size", "enable_relu_and_dropout", "use_bias", "xlora_dropout_p", "top_k_lora"),
        *("use_trainable_adapters", "softmax_temperature", "scaling_pass_value", "global_scaling_weight"),
    }
    shapes = {name: tuple(t.shape) for name, t in load_file(saved / "xlora_classifier.safetensors").items()}
    assert shapes == {
        "inner.0.weight": (16, 32),
        "inner.0.bias": (16,),
        "last.weight": (3 * SITES, 16),
        "last.bias": (3 * SITES,),
    }


@pytest.mark.parametrize(("relu", "step"), [(True, 3), (False, 1)])
def test_hidden_layers_are_numbered_as_the_original_does(relu, step, folders, tmp_path):
    model = build(folders, xlora_depth=4, xlora_size=8, enable_relu_and_dropout=relu, use_bias=False)
    model.save_pretrained(tmp_path / "x", layouts=("xlora",))
    names = set(load_file(tmp_path / "x" / "xlora_classifier.safetensors"))
    assert names == {f"inner.{k * step}.weight" for k in range(3)} | {"last.weight"}


def test_the_ordering_file_of_mistralrs(model, folders, tmp_path):
    with pytest.raises(ValueError, match="base_model_id: got None, need the base model's Hub id"):
        model.export_ordering(tmp_path / "new" / "ordering.json")
    model.xlora_config.base_model_id = "org/base"
    model.export_ordering(tmp_path / "new" / "ordering.json")
    ordering = json.loads((tmp_path / "new" / "ordering.json").read_text())
    assert ordering["order"] == ["law", "code", "bio"]
    assert ordering["base_model_id"] == "org/base"
    assert ordering["layers"] == {site: index for index, site in enumerate(model.sites)}
    other = build(folders, top_k_lora=2, enable_softmax=False, enable_softmax_topk=True)
    with pytest.raises(ValueError, match="mistral.rs has no softmax"):
        other.export_ordering(tmp_path / "x.json")


# ---- PEFT's layout, where it cannot be
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"enable_relu_and_dropout": False, "xlora_depth": 2, "xlora_size": 8}, "always has ReLU"),
        ({"scaling_pass_topk": False, "top_k_lora": 2, "scaling_pass_value": 0.1}, "scaling_pass_topk=False"),
    ],
)
def test_what_peft_cannot_hold_is_left_out_with_the_reason_or_refused_by_name(fields, reason, folders, tmp_path):
    model = build(folders, **fields)
    model.save_pretrained(tmp_path / "x")
    card = json.loads((tmp_path / "x" / "mole_xlora.json").read_text())
    assert card["peft_layout"]["written"] is False
    assert reason in card["peft_layout"]["reason"]
    assert "adapter_config.json" not in files(tmp_path / "x")
    with pytest.raises(ValueError, match=reason):
        model.save_pretrained(tmp_path / "y", layouts=("peft",))
    assert not (tmp_path / "y").exists()


# ---- saving is careful
def test_bad_arguments_of_save_are_refused_before_anything_is_written(model, tmp_path):
    for options, says in [
        ({"safe_serialization": False}, "safetensors only"),
        ({"layouts": ("hf",)}, "layouts: got 'hf'"),
        ({"experts": "link"}, "experts: got 'link'"),
        ({"state_dict": model.state_dict()}, "state_dict: got tensors, need None"),
    ]:
        with pytest.raises(ValueError, match=says):
            model.save_pretrained(tmp_path / "x", **options)
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(tmp_path / "x", False)
    model.save_pretrained(tmp_path / "x", is_main_process=False, state_dict=None)
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", True)
    assert (tmp_path / "x" / "mole_xlora.json").is_file()


@pytest.mark.parametrize("where", ["router", "expert"])
def test_values_that_are_not_finite_replace_no_good_checkpoint(folders, tmp_path, where):
    model = build(folders, use_trainable_adapters=True)
    model.save_pretrained(tmp_path / "x")
    want = logits(model)
    tensor = model.router.classifier[-1].bias if where == "router" else next(iter(model.layers.values())).bank.A
    tensor.data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=rf"{where}.*: got values that are not finite.*nothing was saved"):
        model.save_pretrained(tmp_path / "x")
    assert torch.equal(logits(xlora.from_pretrained(tmp_path / "x", llama())), want)


@pytest.mark.parametrize("fails_at", range(0, 26, 5))
def test_a_save_that_fails_leaves_the_earlier_checkpoint_readable(saved, folders, monkeypatch, fails_at):
    import os

    before, want = files(saved), logits(xlora.from_pretrained(saved, llama()))
    real, left = os.replace, [fails_at]

    def replace(source, target):
        left[0] -= 1
        if left[0] == -1:
            raise OSError("disk full")
        real(source, target)

    other = build(folders, xlora_depth=1)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(saved)
    assert left[0] < 0
    assert files(saved) == before
    assert torch.equal(logits(xlora.from_pretrained(saved, llama())), want)


def test_a_later_save_takes_away_what_no_longer_belongs_and_nothing_else(saved, folders):
    (saved / "tokenizer.json").write_text("{}")
    (saved / "code" / "notes.txt").write_text("mine")
    (saved / "README.md").write_text("# my own")
    fields = {"enable_relu_and_dropout": False, "xlora_depth": 2, "xlora_size": 8}
    build({"law": folders["law"], "chem": folders["bio"]}, **fields).save_pretrained(saved)
    left = {"mole_xlora.json", "xlora_config.json", "xlora_classifier.safetensors", "README.md", "tokenizer.json"}
    assert files(saved) == left | {"code/notes.txt"} | {f"{n}/{f}" for n in ("law", "chem") for f in EXPERT}
    assert (saved / "README.md").read_text() == "# my own"
    assert not (saved / "bio").exists()
    assert xlora.from_pretrained(saved, llama()).experts == ("law", "chem")


def test_saving_over_the_experts_that_it_was_built_from_works(tmp_path):
    adapters = {name: write_expert(tmp_path / "x" / name, lora(i)) for i, name in enumerate(("a", "b"))}
    model = build(adapters)
    want = logits(model)
    model.save_pretrained(tmp_path / "x")
    assert torch.equal(logits(xlora.from_pretrained(tmp_path / "x", llama())), want)
    assert torch.equal(logits(model, ids()), want)
