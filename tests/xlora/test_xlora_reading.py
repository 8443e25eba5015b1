"""Checkpoints that others wrote: every form that is read, and every damage that is refused with its cause."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from xlora_cases import SITES, build, llama, logits, lora, write_expert

from mole import xlora
from mole.adapters.peft_format import WEIGHTS
from mole.xlora.places import find_expert

FIELDS = {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 8}


@pytest.fixture
def parts(folders, tmp_path):
    """The original's two files in a folder of their own, their config, and the logits of the model."""
    model = build(folders, **FIELDS)
    model.save_pretrained(tmp_path / "whole")
    folder = tmp_path / "x"
    folder.mkdir()
    for name in ("xlora_config.json", "xlora_classifier.safetensors"):
        shutil.copy(tmp_path / "whole" / name, folder / name)
    config = json.loads((folder / "xlora_config.json").read_text())
    return folder, config, logits(model)


def write(folder: Path, config: dict, **changes) -> None:
    new = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (folder / "xlora_config.json").write_text(json.dumps(new))


def edit(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def load(folder, **options) -> torch.Tensor:
    return logits(xlora.from_pretrained(folder, llama(), **options))


# ---- the original's four forms, and the early layouts
def test_a_config_without_adapters_asks_for_them(parts, folders):
    folder, config, want = parts
    write(folder, config, adapters=..., stop_token_id=2, device="the third gpu")
    with pytest.raises(ValueError, match=r"xlora_config\.json does not name its experts: pass adapters="):
        load(folder)
    assert torch.equal(load(folder, adapters=folders), want)
    with pytest.raises(ValueError, match=rf"layer 3 of 3: expected shape \({2 * SITES}, 8\), got \({3 * SITES}, 8\)"):
        load(folder, adapters={name: folders[name] for name in ("law", "code")})


def test_router_tensors_and_other_numbered_experts_in_an_expert_folder_are_left_out(parts, folders):
    """As PEFT 0.19.1 saves the experts of the original X-LoRA: its filter takes "lora_" in "xlora_classifier" too."""
    folder, config, want = parts
    write(folder, config, adapters=["0", "1", "2"])
    for index, place in enumerate(folders.values()):
        shutil.copytree(place, folder / str(index))

        def pollute(tensors, index=index):
            for name in [name for name in tensors if ".layers.0." in name]:
                for end in (".lora_A.weight", ".lora_B.weight"):
                    if name.endswith(end):
                        other = name.replace(end, f"{end[:7]}.{(index + 1) % 3}.weight")
                        tensors[other] = torch.ones_like(tensors[name])
            tensors["base_model.internal_xlora_classifier.inner.0.bias"] = torch.ones(8)
            tensors["internal_xlora_classifier.last.bias"] = torch.ones(3)

        edit(folder / str(index) / "adapter_model.safetensors", pollute)
    assert any(".lora_A.1." in name for name in load_file(folder / "0" / "adapter_model.safetensors"))
    assert torch.equal(load(folder), want)


def test_a_folder_in_which_peft_s_x_lora_left_its_whole_model_is_no_expert(folders, tmp_path):
    folder = tmp_path / "0"
    shutil.copytree(folders["law"], folder)
    whole = load_file(folder / "adapter_model.safetensors")
    inner = {name.replace("base_model.", "base_model.lora_model.", 1): tensor for name, tensor in whole.items()}
    save_file(inner | {"base_model.internal_xlora_classifier.layers.0.bias": torch.ones(3)}, folder / WEIGHTS)
    assert find_expert(folder, "here") is None
    with pytest.raises(ValueError, match="expected LoRA tensors of an expert, found none.*adapters={name: path}"):
        xlora.add_xlora_to_model(llama(), xlora.xLoRAConfig(), {"0": str(folder)})


def test_hub_sub_paths_are_found_beside_the_config(parts, folders):
    folder, config, want = parts
    write(folder, config, adapters={name: f"org/repo/experts/{name}/" for name in folders}, base_model_id="org/base")
    for name in folders:
        shutil.copytree(folders[name], folder / "experts" / name)
    assert torch.equal(load(folder), want)


@pytest.mark.parametrize("stored", ["/gone/run/{}", "gone/{}", "../{}"])
@pytest.mark.parametrize("below", ["", "adapters"])
def test_experts_whose_paths_are_gone_are_found_in_the_folder(parts, folders, stored, below):
    folder, config, want = parts
    write(folder, config, adapters={name: stored.format(name) for name in folders})
    for name in folders:
        shutil.copytree(folders[name], folder / below / name)
    assert torch.equal(load(folder, local_files_only=True), want)


def test_experts_are_found_where_the_config_says(parts, folders):
    folder, config, want = parts
    write(folder, config, adapters=folders)
    assert torch.equal(load(folder), want)


def test_experts_that_are_nowhere_are_named_with_all_places_tried(parts, folders):
    folder, config, _ = parts
    write(folder, config, adapters={name: f"/gone/{name}" for name in folders})
    with pytest.raises(ValueError, match=rf"expert 'law'.*{folder}/law; {folder}/adapters/law; /gone/law.*adapters="):
        load(folder)


def test_names_alone_mean_folders_beside_the_config_or_below_adapters(parts, folders):
    folder, config, want = parts
    write(folder, config, adapters=list(folders))
    shutil.copytree(folders["law"], folder / "law")
    for name in ("code", "bio"):
        shutil.copytree(folders[name], folder / "adapters" / name)
    assert torch.equal(load(folder), want)
    write(folder, config, adapters=...)
    assert torch.equal(load(folder, adapters=list(folders)), want)


def test_names_never_lead_out_of_the_folder(parts, folders):
    folder, config, _ = parts
    names = ["../law", "..", "a/../../law"]
    write(folder, config, adapters=names)
    write_expert(folder.parent / "law", lora())
    with pytest.raises(ValueError, match=r"expert '\.\./law'.*found none in the checkpoint"):
        load(folder)


def test_hub_experts_come_from_the_cache_when_offline(parts, folders, tmp_path, monkeypatch):
    import huggingface_hub.constants

    folder, config, want = parts
    snapshot = tmp_path / "hub" / "models--org--repo" / "snapshots" / ("a" * 40)
    for name in folders:
        shutil.copytree(folders[name], snapshot / "experts" / name)
    shutil.copytree(folder, snapshot / "mixture")
    write(snapshot / "mixture", config, adapters={name: f"org/repo/experts/{name}" for name in folders})
    refs = tmp_path / "hub" / "models--org--repo" / "refs" / "main"
    refs.parent.mkdir(parents=True)
    refs.write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert torch.equal(load("org/repo/mixture", local_files_only=True), want)
    model = build({"law": "org/repo/experts/law", "code": ("org/repo", "experts/code")}, base=llama())
    assert model.xlora_config.adapters["law"] == "org/repo/experts/law"
    with pytest.raises(ValueError, match="org/absent is no folder here and cannot be had from the Hub"):
        load("org/absent", local_files_only=True)
    with pytest.raises(ValueError, match="no folder here, and no Hub id"):
        load("absent")


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_early_config_without_relu_is_told_by_the_router_or_asks(relu, depth, folders, tmp_path):
    fields = {"xlora_depth": depth, "xlora_size": 8, "enable_relu_and_dropout": relu}
    model = build(folders, **fields)
    model.save_pretrained(tmp_path / "x", layouts=("xlora",))
    (tmp_path / "x" / "mole_xlora.json").unlink()
    config = json.loads((tmp_path / "x" / "xlora_config.json").read_text())
    write(tmp_path / "x", config, enable_relu_and_dropout=...)
    if depth == 2:
        with pytest.raises(ValueError, match=r"depth 2 does not show it; pass config_overrides="):
            load(tmp_path / "x")
        overrides = {"enable_relu_and_dropout": relu}
        assert torch.equal(load(tmp_path / "x", config_overrides=overrides), logits(model))
    else:
        assert torch.equal(load(tmp_path / "x"), logits(model))


# ---- what is damaged, foreign, or dangerous
def test_pickles_are_refused_by_name(parts, folders):
    folder, config, _ = parts
    write(folder, config, adapters=folders)
    (folder / "xlora_classifier.safetensors").rename(folder / "xlora_classifier.pt")
    with pytest.raises(ValueError, match=r"xlora_classifier\.pt is a pickle.*scripts/pickle_to_safetensors\.py"):
        load(folder)
    with pytest.raises(ValueError, match="is a pickle"):
        load(folder, classifier_path=folder / "xlora_classifier.pt")


def test_a_pickled_expert_is_refused_by_name(parts, tmp_path, folders):
    expert = tmp_path / "pickled"
    shutil.copytree(folders["law"], expert)
    (expert / "adapter_model.safetensors").rename(expert / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        load(parts[0], adapters={**folders, "law": str(expert)})


def damaged(name, change, says, **fields):
    return pytest.param(name, change, says, fields, id=says[:40])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("last.weight"), r"expected a weight beside the bias"),
        (lambda t: [t.pop("last.weight"), t.pop("last.bias")], r"expected last\.weight, got inner\.0, inner\.3"),
        (
            lambda t: [t.pop("inner.3.weight"), t.pop("inner.3.bias")],
            "expected 2 hidden layers for xlora_depth=3, got 1",
        ),
        (lambda t: t.pop("inner.0.bias"), r"layer 1: expected a bias of shape \(8,\) \(use_bias=True\), got none"),
        (lambda t: t.update({"last.weight": torch.zeros(3, 8)}), rf"expected shape \({3 * SITES}, 8\), got \(3, 8\)"),
        (lambda t: t.update({"inner.0.weight": torch.zeros(8, 31)}), r"layer 1 of 3: expected shape \(8, 32\)"),
        (lambda t: t.update({"inner.0.weight": torch.full((8, 32), float("nan"))}), "not finite"),
        (lambda t: t.update({"inner.0.weight": torch.zeros(8, 32, dtype=torch.int64)}), "dtype"),
        (lambda t: t.update({"surplus.weight": torch.zeros(1)}), "got 'surplus.weight'"),
        (
            lambda t: t.update({k.replace(".3.", ".2."): t.pop(k) for k in ("inner.3.weight", "inner.3.bias")}),
            "expected hidden layers 3 apart",
        ),
    ],
)
def test_a_damaged_router_is_refused(parts, folders, change, says):
    folder = parts[0]
    edit(folder / "xlora_classifier.safetensors", change)
    base = llama()
    before = dict(base.named_modules())
    with pytest.raises(ValueError, match=rf"(?s)xlora_classifier\.safetensors.*{says}"):
        xlora.from_pretrained(folder, base, adapters=folders)
    assert dict(base.named_modules()) == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"xlora_depth": 3, "xlora_depth": 1}', "twice"),
        ("{", "not valid JSON"),
        ("[]", "expected an object, got list"),
        ('{"xlora_depth": 3, "xlora_deep": 1}', "xlora_deep: no such field"),
        ('{"xlora_depth": 3, "enable_relu_and_dropout": true, "hidden_size": 64}', "hidden_size: got 64"),
        ('{"xlora_depth": 3, "enable_softmax_topk": true}', r"'softmax_temperature': 1.0\} keeps it"),
        (
            '{"xlora_depth": 3, "enable_softmax_topk": true, "top_k_lora": 1}',
            "took both softmaxes, which no setting here repeats",
        ),
    ],
)
def test_a_damaged_config_is_refused(parts, folders, text, says):
    (parts[0] / "xlora_config.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        load(parts[0], adapters=folders)


def test_an_override_keeps_what_the_writer_computed(parts, folders):
    folder, config, _ = parts
    write(folder, config, enable_softmax_topk=True, enable_softmax=False, softmax_temperature=0.3)
    overrides = {"enable_softmax_topk": False, "enable_softmax": True, "softmax_temperature": 1.0}
    model = xlora.from_pretrained(folder, llama(), adapters=folders, config_overrides=overrides)
    assert model.xlora_config.softmax_temperature == 1.0


def test_an_expert_of_other_shapes_or_none_leaves_the_model_as_it_was(parts, folders, tmp_path):
    wide = llama()
    wide.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 48)
    other = write_expert(tmp_path / "other", lora(model=wide))
    empty = tmp_path / "empty"
    empty.mkdir()
    router = tmp_path / "router"
    shutil.copytree(tmp_path / "whole", router)  # PEFT's sub-folders with router tensors
    for place, says in [
        (other, "law"),
        (empty, "no expert in"),
        (router, "expected LoRA tensors.*X-LoRA writes router"),
    ]:
        base = llama()
        before = dict(base.named_modules())
        with pytest.raises(ValueError, match=rf"(?s){says}"):
            xlora.from_pretrained(parts[0], base, adapters={**folders, "law": str(place)})
        assert dict(base.named_modules()) == before


def test_two_different_routers_without_a_card_are_refused(tmp_path, folders):
    build(folders).save_pretrained(tmp_path / "x")
    (tmp_path / "x" / "mole_xlora.json").unlink()
    load(tmp_path / "x")
    edit(tmp_path / "x" / "xlora_classifier.safetensors", lambda t: t["last.bias"].add_(1))
    with pytest.raises(ValueError, match="hold different routers"):
        load(tmp_path / "x")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"no X-LoRA checkpoint in .*expected mole_xlora\.json, xlora_config\.json or"):
        load(tmp_path)


# ---- our own card
@pytest.fixture
def own(tmp_path, folders):
    build(folders, base_model_id="org/base").save_pretrained(tmp_path / "own")
    return tmp_path / "own"


@pytest.mark.parametrize(
    "file", ["xlora_classifier.safetensors", "code/adapter_model.safetensors", "code/adapter_config.json"]
)
def test_a_changed_file_is_refused(own, file):
    data = bytearray((own / file).read_bytes())
    if file.endswith("json"):
        data = data.replace(b'"lora_dropout": 0.0', b'"lora_dropout": 0.1')
    else:
        data[-1] ^= 1
    (own / file).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"sha256"):
        load(own)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 2; another version of mole"),
        ({"more": 1}, "more"),
        ({"layers": ["model.layers.0.self_attn.q_proj"]}, "expected the card's 1 layers, got 6"),
        ({"config": {"xlora_depth": 0}}, "xlora_depth: got 0"),
        ({"config": {"xlora_deep": 1}}, "xlora_deep: no such field"),
        ({"base": {"hidden_size": 64}}, "expected hidden_size 64, got 32"),
        ({"base": {"vocab_size": 100}}, "expected vocab_size 100, got 101"),
        ({"base": {"architecture": "MistralForCausalLM"}}, "expected architecture 'MistralForCausalLM'"),
        ({"router": {"file": "../secret"}}, "router.file: expected xlora_classifier.safetensors"),
        ({"experts": [{"folder": "../../law"}, {}, {}]}, "cannot lie in the folder"),
        ({"experts": [{"index": 1}, {}, {}]}, r"expected experts 0 … 2 in order"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(own, change, says):
    path = own / "mole_xlora.json"
    card = json.loads(path.read_text())
    for key, value in change.items():
        if isinstance(value, dict):
            card[key] = {**card[key], **value}
        elif key == "experts":
            card[key] = [{**row, **new} for row, new in zip(card[key], value, strict=True)]
        else:
            card[key] = value
    path.write_text(json.dumps(card))
    base = llama()
    before = dict(base.named_modules())
    with pytest.raises(ValueError, match=says):
        xlora.from_pretrained(own, base)
    assert dict(base.named_modules()) == before


def test_another_base_needs_to_be_allowed(own):
    base = llama()
    base.config.name_or_path = "org/other"
    with pytest.raises(ValueError, match=r"expected id 'org/base', got 'org/other'.*allow_other_base=True"):
        xlora.from_pretrained(own, base)
    xlora.from_pretrained(own, base, allow_other_base=True)


# ---- PEFT's files
@pytest.fixture
def peft_folder(tmp_path, folders):
    names = [str(index) for index in range(3)]
    numbered = dict(zip(names, folders.values(), strict=True))
    model = build(numbered, **FIELDS)
    model.save_pretrained(tmp_path / "p")
    for name in ("mole_xlora.json", "xlora_config.json", "xlora_classifier.safetensors"):
        (tmp_path / "p" / name).unlink()
    return tmp_path / "p", logits(model)


def test_numbered_sub_folders_are_used_only_where_they_hold_an_expert(peft_folder, folders):
    folder, want = peft_folder
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["adapters"] = {"0": "/gone/a", "1": folders["code"], "2": "/gone/b"}
    path.write_text(json.dumps(config))
    assert torch.equal(load(folder), want)
    shutil.copy(folder / "adapter_model.safetensors", folder / "2" / "adapter_model.safetensors")  # the router's
    with pytest.raises(ValueError, match=r"expert '2'.*found none in /gone/b"):
        load(folder)
    given = dict(zip(("a", "b", "c"), folders.values(), strict=True))
    assert torch.equal(load(folder, adapters=given), want)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t, p: t.pop(f"{p}layers.0.weight"),
            r"expected layers\.0\.weight, got 5 router tensors\. PEFT 0\.20\.0",
        ),
        (lambda t, p: t.update({f"{p}layers.bias": t.pop(f"{p}layers.0.bias")}), "has lost its index"),
        (
            lambda t, p: t.update({f"{p}layers.9.bias": torch.zeros(1), f"{p}layers.9.weight": torch.zeros(1, 1)}),
            r"\[9\]",
        ),
        (lambda t, p: t.update({"base_model.model.x": torch.zeros(1)}), "no X-LoRA router"),
    ],
)
def test_a_router_that_peft_mangled_is_refused_with_the_cause(peft_folder, change, says):
    prefix = "base_model.internal_xlora_classifier."
    edit(peft_folder[0] / "adapter_model.safetensors", lambda t: change(t, prefix))
    with pytest.raises(ValueError, match=rf"(?s)adapter_model\.safetensors.*{says}"):
        load(peft_folder[0])
