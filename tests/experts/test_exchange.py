"""In and out: PEFT is the oracle of what comes in, and of what goes out."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mole
from mole.adapters import Adapter, LoraWeights, attach_weights
from mole.experts import BackboneRef, Damaged, Expert, LibraryError, Refused, describe, load_expert
from mole.experts.exporting import Form, adapter_weights, converted, export
from mole.experts.importing import Hints, import_expert

ROOT = Path(mole.__file__).parent.parent
TOKENS = torch.arange(14).reshape(2, 7)


def make_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=32, **sizes)).eval()


def make_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).eval()


MODELS = {"llama": make_llama, "gpt2": make_gpt2}


def save_with_peft(model, folder, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(copy.deepcopy(model), config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name or "lora_embedding_A" in name or "ia3_l" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        made.save_pretrained(folder)
    return made


def load_with_peft(model, folder, caplog):
    with warnings.catch_warnings(record=True) as found, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    told = [str(w.message) for w in found if "is_gradient_checkpointing" not in str(w.message)]
    return loaded, told + [record.message for record in caplog.records]


SETTINGS = {
    "all-linear": lambda: peft.LoraConfig(r=2, target_modules="all-linear"),
    "a pattern of targets": lambda: peft.LoraConfig(r=2, lora_alpha=5, target_modules=r".*\.1\..*(c_attn|q_proj|fc)"),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules="all-linear"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_peft_saved_comes_in_and_goes_out_with_the_same_logits(tmp_path, caplog, kind, settings):
    if kind == "gpt2" and settings == "dora":
        pytest.skip("peft itself cannot put DoRA on every Conv1D")
    model = MODELS[kind]()
    theirs = save_with_peft(model, tmp_path / "theirs", SETTINGS[settings]())
    expert = import_expert(tmp_path / "theirs", hints=Hints(backbone="user/model"), tasks=["a"])
    export(expert, "a", tmp_path / "ours", Form())
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded, told = load_with_peft(model, tmp_path / "ours", caplog)
    assert told == []
    torch.testing.assert_close(loaded(TOKENS).logits, theirs(TOKENS).logits, atol=1e-5, rtol=0)
    again = import_expert(tmp_path / "ours")
    assert again.card.content == expert.card.content
    if settings != "dora":
        mine = MODELS[kind]()
        attach_weights(mine, again.adapter)
        torch.testing.assert_close(mine(TOKENS).logits, theirs(TOKENS).logits, atol=1e-5, rtol=0)


def unlike_ranks():
    modules = {}
    generator = torch.Generator().manual_seed(0)
    llama = make_llama()
    for place, path in enumerate(f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qko"):
        base, rank = llama.get_submodule(path), place % 3 + 1
        A = torch.randn(rank, base.in_features, generator=generator)
        B = torch.randn(base.out_features, rank, generator=generator)
        modules[path] = LoraWeights(A=A, B=B, alpha=float(1 + place // 2), rslora=place % 2 == 0)
    adapter = Adapter("lora", modules, targets=("q_proj", "k_proj", "o_proj"))
    return Expert(describe(adapter, BackboneRef("user/llama")), adapter)


def test_a_normalised_folder_needs_nothing_but_r_and_alpha(tmp_path, caplog):
    expert = unlike_ranks()
    export(expert, "a", tmp_path / "x", Form(format="normalised"))
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3
    # A reader that knows neither patterns nor rsLoRA, as servers are
    plain = {key: config[key] for key in ("r", "lora_alpha", "target_modules", "peft_type", "task_type")}
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(plain))
    loaded, told = load_with_peft(make_llama(), tmp_path / "x", caplog)
    mine = make_llama()
    attach_weights(mine, expert.adapter)
    torch.testing.assert_close(loaded(TOKENS).logits, mine(TOKENS).logits, atol=1e-5, rtol=0)
    assert told == []


def test_a_folder_with_its_card_is_an_experts_again(tmp_path):
    expert = unlike_ranks()
    export(expert, "a", tmp_path / "x", Form(card=True))
    assert load_expert(tmp_path / "x").revision == expert.revision
    export(expert, "a", tmp_path / "half", Form(card=True, dtype="bfloat16"))
    half = load_expert(tmp_path / "half")
    assert half.card.adapter["dtype"] == "bfloat16"
    assert half.adapter.dtype == torch.bfloat16
    assert half.card.content != expert.card.content


def test_values_that_a_dtype_cannot_hold_are_told():
    expert = unlike_ranks()
    next(iter(expert.adapter.modules.values())).A.mul_(1e6)
    with pytest.raises(LibraryError, match="too large for float16: use bfloat16"):
        converted(expert.adapter, "float16")
    assert converted(expert.adapter, "bfloat16").dtype == torch.bfloat16


def test_a_folder_with_content_is_not_overwritten(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose a new folder"):
        export(unlike_ranks(), "a", tmp_path / "x", Form())
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["mine.txt"]


def test_addresses_are_pinned(library, make):
    for seed, name in enumerate("ba"):
        library.add_expert(make(seed), name)
    found = adapter_weights(library.url, library.cards())
    assert list(found) == ["a", "b"]
    assert found["a"] == f"{library.url}/a@{library.card('a').revision}"
    assert load_expert(found["b"]).revision == library.card("b").revision
    assert adapter_weights("hf://user/repo", library.cards())["a"].startswith("hf://user/repo/a@")


class TestImport:
    def test_the_card_says_where_it_comes_from(self, tmp_path):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        save_with_peft(make_llama(), tmp_path / "law", config)
        expert = import_expert(tmp_path / "law", hints=Hints(backbone="user/llama"), license="mit")
        (row,) = expert.card.derived_from
        assert (row["relation"], row["source"], row["name"]) == ("imported", "peft", "law")
        assert len(row["content"]) == 64
        assert expert.card.license == "mit"
        weights = tmp_path / "law" / "adapter_config.json"
        weights.write_text(weights.read_text() + "\n")
        again = import_expert(tmp_path / "law", hints=Hints(backbone="user/llama"))
        assert again.card.derived_from[0]["content"] != row["content"]
        assert again.card.content == expert.card.content

    @pytest.mark.parametrize("base", [None, "", "/home/me/llama", "../llama", "C:\\llama"])
    def test_a_backbone_that_is_not_named_has_to_be_said(self, tmp_path, base):
        save_with_peft(make_llama(), tmp_path / "x", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
        (tmp_path / "x" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises(LibraryError, match="say it with backbone=<name>"):
            import_expert(tmp_path / "x")
        assert import_expert(tmp_path / "x", hints=Hints(backbone="a/b")).card.backbone.name == "a/b"

    def test_loralib_wants_the_scale_and_the_backbone(self, tmp_path):
        file = tmp_path / "law.safetensors"
        save_file({"h.0.fc.lora_A": torch.randn(2, 6), "h.0.fc.lora_B": torch.randn(4, 2)}, file)
        with pytest.raises(LibraryError, match="say the lora_alpha of the training"):
            import_expert(file)
        with pytest.raises(LibraryError, match="does not say which backbone"):
            import_expert(file, hints=Hints(alpha=4.0))
        expert = import_expert(file, hints=Hints(alpha=4.0, backbone="gpt2"))
        assert expert.card.adapter["alpha"] == 4.0
        assert expert.card.derived_from[0]["source"] == "loralib"

    def test_what_was_converted_from_a_pickle_says_which(self, tmp_path):
        torch.save({"h.0.fc.lora_A": torch.randn(2, 6), "h.0.fc.lora_B": torch.randn(4, 2)}, tmp_path / "law.pt")
        words = [sys.executable, ROOT / "scripts/pickle_to_safetensors.py", tmp_path / "law.pt", tmp_path / "safe"]
        assert subprocess.run(words, capture_output=True, check=False).returncode == 0
        expert = import_expert(tmp_path / "safe", hints=Hints(alpha=4.0, backbone="gpt2"))
        from hashlib import sha256

        assert expert.card.extra["pickle_sha256"] == sha256((tmp_path / "law.pt").read_bytes()).hexdigest()
        (tmp_path / "safe" / "source.json").write_text('{"sha256": "../../etc"}')
        with pytest.raises(Damaged, match="sha256 is"):
            import_expert(tmp_path / "safe", hints=Hints(alpha=4.0, backbone="gpt2"))

    @pytest.mark.parametrize("name", ["model.p", "adapter_model.bin", "pytorch_adapter.bin", "x.pt", "x.CKPT", "x.pkl"])
    @pytest.mark.parametrize("as_folder", [False, True])
    def test_a_pickle_is_refused_unread_with_the_way_for_who_trusts_it(self, tmp_path, name, as_folder):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / name).write_bytes(pickle.dumps(Boom(tmp_path / "ran")))
        with pytest.raises(Refused, match="could run any program") as caught:
            import_expert(tmp_path / "x" if as_folder else tmp_path / "x" / name)
        assert "scripts/pickle_to_safetensors.py" in str(caught.value)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("beside", ["adapter_model.bin", "training_args.bin", "evil.py", "weights.npy"])
    def test_a_pickle_beside_the_weights_is_refused_too(self, tmp_path, beside):
        save_with_peft(make_llama(), tmp_path / "x", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        (tmp_path / "x" / beside).write_bytes(b"x")
        with pytest.raises(Refused, match=beside):
            import_expert(tmp_path / "x", hints=Hints(backbone="a/b"))

    def test_a_fusion_is_refused_by_name(self, tmp_path):
        for name in ("adapter_fusion_config.json", "model_adapter_fusion.safetensors"):
            (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(Refused, match="a composition of several adapters"):
            import_expert(tmp_path)

    def test_a_link_out_of_the_folder_is_followed_by_nobody_who_must_not(self, tmp_path):
        os.mkfifo(tmp_path / "weights.safetensors")
        with pytest.raises(Refused, match="not a regular file"):
            import_expert(tmp_path / "weights.safetensors")

    @pytest.mark.parametrize(
        ("place", "told"),
        [
            ("nowhere", "does not exist"),
            ("s3://bucket/x", "adapters are imported from a folder"),
            ("empty", "has no .safetensors file"),
            ("expert", "mole library add takes it as it is"),
            ("two", "several files of tensors"),
            ("unknown.safetensors", "of no layout that is known"),
        ],
    )
    def test_what_is_no_adapter_is_told_with_what_to_do(self, tmp_path, make, place, told):
        (tmp_path / "empty").mkdir()
        make().save(tmp_path / "expert")
        (tmp_path / "two").mkdir()
        for file in ("two/a", "two/b", "unknown"):
            save_file({"weight": torch.ones(1)}, tmp_path / f"{file}.safetensors")
        with pytest.raises(LibraryError, match=told):
            import_expert(place if "://" in place else tmp_path / place)


class Boom:
    """Unpickled, it leaves a file."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def test_torch_load_stands_in_the_script_alone():
    found = [
        str(file.relative_to(ROOT))
        for folder in ("mole", "scripts")
        for file in (ROOT / folder).rglob("*.py")
        if "torch.load(" in file.read_text(encoding="utf-8")
    ]
    assert found == ["scripts/pickle_to_safetensors.py"]


@pytest.mark.parametrize("kind", ["boom", "list", "nested", "numbers"])
def test_the_script_refuses_all_but_flat_weights(tmp_path, kind):
    value = {
        "boom": Boom(tmp_path / "ran"),
        "list": [torch.ones(1)],
        "nested": {"state": {"a": torch.ones(1)}},
        "numbers": {"a": 1},
    }[kind]
    torch.save(value, tmp_path / "x.pt")
    words = [sys.executable, ROOT / "scripts/pickle_to_safetensors.py", tmp_path / "x.pt", tmp_path / "safe"]
    done = subprocess.run(words, capture_output=True, check=False, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "safe").exists()
    assert not (tmp_path / "ran").exists()
