"""Both generations of every function's signature, and what fits neither."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from xlora_cases import build, llama, logits, write_experts

from mole import xlora
from mole.xlora import xlora_utils


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    model = build(folders)
    model.save_pretrained(root / "x")
    return root / "x", logits(model)


# ---- add_xlora_to_model
@pytest.mark.parametrize(
    "call",
    [
        lambda c, a: xlora.add_xlora_to_model(llama(), c, a, True),
        lambda c, a: xlora.add_xlora_to_model(llama(), c, a, verbose=True),
        lambda c, a: xlora.add_xlora_to_model(llama(), c, adapters=a, verbose=True),
        lambda c, a: xlora.add_xlora_to_model(model=llama(), xlora_config=xlora.xLoRAConfig(32, a), verbose=True),
        lambda c, a: xlora.add_xlora_to_model(llama(), xlora.xLoRAConfig(32, adapters=a), True),
        lambda c, a: xlora.add_xlora_to_model(llama(), xlora.xLoRAConfig(32, adapters=a), None, True),
        lambda c, a: xlora.add_xlora_to_model(llama(), xlora.xLoRAConfig(32, adapters=a), a, True),
        lambda c, a: xlora.add_xlora_to_model(llama(), {"hidden_size": 32, "adapters": a}, True),
    ],
)
def test_add_xlora_to_model_takes_both_forms(call, folders, capsys):
    model = call(xlora.xLoRAConfig(32, base_model_id="org/base", device=torch.device("cpu")), folders)
    assert model.experts == ("law", "code", "bio")
    assert "trainable params: 99 ||" in capsys.readouterr().out


def test_adapters_are_given_once_and_somewhere(folders):
    with pytest.raises(ValueError, match="adapters: got none"):
        xlora.add_xlora_to_model(llama(), xlora.xLoRAConfig())
    with pytest.raises(ValueError, match=r"got \['law'\] beside the config's"):
        xlora.add_xlora_to_model(llama(), xlora.xLoRAConfig(adapters=folders), {"law": folders["law"]})
    with pytest.raises(ValueError, match="in the same order, which is that of the gates"):
        xlora.add_xlora_to_model(llama(), xlora.xLoRAConfig(adapters=folders), dict(reversed(folders.items())))
    with pytest.raises(ValueError, match="got the names"):
        xlora.add_xlora_to_model(llama(), xlora.xLoRAConfig(adapters=["law"]))
    with pytest.raises(TypeError, match=r"float by place.*verbose: bool"):
        xlora.add_xlora_to_model(llama(), xlora.xLoRAConfig(), 0.5)


def test_a_sub_folder_may_stand_beside_its_place(folders, tmp_path):
    write_experts(tmp_path)
    places = {"law": (str(tmp_path), "source-0"), "code": folders["code"]}
    want = logits(build({"law": folders["law"], "code": folders["code"]}))
    assert torch.equal(logits(build(places)), want)
    split = xlora.add_xlora_to_model(
        llama(), xlora.xLoRAConfig(), {"law": tmp_path, "code": folders["code"]}, subfolders=["source-0", None]
    )
    assert split.experts == ("law", "code")
    with pytest.raises(ValueError, match="subfolders: got 1, need one for each of 2"):
        xlora.add_xlora_to_model(llama(), xlora.xLoRAConfig(), places, subfolders=["source-0"])


# ---- from_pretrained
@pytest.mark.parametrize(
    "call",
    [
        lambda d, m, a: xlora.from_pretrained(d, m),
        lambda d, m, a: xlora.from_pretrained(d, m, "cpu"),
        lambda d, m, a: xlora.from_pretrained(d, m, torch.device("cpu")),
        lambda d, m, a: xlora.from_pretrained(str(d), m, a, "cpu", True, True),
        lambda d, m, a: xlora.from_pretrained(d, m, list(a), "cpu", False, True),
        lambda d, m, a: xlora.from_pretrained(d, m, tuple(a), "cpu", verbose=False),
        lambda d, m, a: xlora.from_pretrained(d, m, None, "cpu", False),
        lambda d, m, a: xlora.from_pretrained(d, m, "cpu", a),
        lambda d, m, a: xlora.from_pretrained(d, m, "cpu", None, None, None, True),
        lambda d, m, a: xlora.from_pretrained(d, m, "cpu", {k: Path(v) for k, v in a.items()}, verbose=True),
        lambda d, m, a: xlora.from_pretrained(
            d, m, "cpu", None, f"{d}/xlora_classifier.safetensors", d / "xlora_config.json", False
        ),
        lambda d, m, a: xlora.from_pretrained(
            load_directory=d, model=m, device=None, adapters=a, from_safetensors=True
        ),
    ],
)
def test_from_pretrained_takes_both_forms(call, saved, folders):
    folder, want = saved
    assert torch.equal(logits(call(folder, llama(), folders)), want)


def test_names_in_another_order_are_brought_into_the_checkpoints(saved, folders):
    folder, want = saved
    for adapters in (["bio", "law", "code"], dict(reversed(folders.items()))):
        model = xlora.from_pretrained(folder, llama(), adapters=adapters)
        assert model.experts == ("law", "code", "bio")
        assert torch.equal(logits(model), want)


@pytest.mark.parametrize("adapters", [["law", "code"], ["law", "code", "art"], {"law": "x"}])
def test_other_names_are_refused_with_both_lists(saved, adapters):
    with pytest.raises(ValueError, match=r"adapters: got \['law'.*\['law', 'code', 'bio'\]"):
        xlora.from_pretrained(saved[0], llama(), adapters=adapters)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((0.5,), {}),
        (({}, []), {}),
        ((True, True, True), {}),
        (("cpu", "a", "b", "c"), {}),
        (("cpu",), {"device": "cpu"}),
        ((), {"devise": "cpu"}),
    ],
)
def test_arguments_that_fit_no_form_show_both(saved, args, named):
    with pytest.raises(TypeError, match=r"from_pretrained\(folder, model, device.*or, earlier"):
        xlora.from_pretrained(saved[0], llama(), *args, **named)


@pytest.mark.parametrize("name", ["adapters", "device"])
def test_overrides_that_could_not_act_are_refused(saved, folders, name):
    value = folders if name == "adapters" else "cpu"
    with pytest.raises(ValueError, match=f"config_overrides: got {name}.* pass {name}=… beside it"):
        xlora.from_pretrained(saved[0], llama(), config_overrides={name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_refused_and_the_base_stays_as_it_was(saved, folders):
    base = llama()
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match="device: got 'cuda', need a device of this machine"):
        xlora.add_xlora_to_model(base, xlora.xLoRAConfig(device="cuda"), folders)
    for device in ("cuda", "abacus"):
        with pytest.raises(ValueError, match=f"device: got '{device}', need a device of this machine"):
            xlora.from_pretrained(saved[0], base, device=device)
    assert dict(base.named_modules()) == modules


def test_pickled_routers_are_refused_with_the_way_out(saved):
    with pytest.raises(ValueError, match=r"from_safetensors: got False.*scripts/pickle_to_safetensors\.py"):
        xlora.from_pretrained(saved[0], llama(), from_safetensors=False)


# ---- load_model
@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model with its tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def on_disk(base, folders, tmp_path_factory):
    """An X-LoRA that names its base model."""
    root = tmp_path_factory.mktemp("xlora")
    model = build(folders, base_model_id=str(base))
    model.save_pretrained(root / "x")
    return root / "x", logits(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda b, x, a: xlora_utils.load_model(x, "cpu", torch.float32),
        lambda b, x, a: xlora_utils.load_model(x, torch.device("cpu"), torch.float32, None, False, True, True),
        lambda b, x, a: xlora_utils.load_model(model_name=x, device="cpu", dtype=torch.float32, adapters=a),
        lambda b, x, a: xlora_utils.load_model(b, x, "cpu", torch.float32, a),
        lambda b, x, a: xlora_utils.load_model(
            model_name=b, fine_tune_model_name=x, device="cpu", dtype=torch.float32, adapters=list(a), use_cache=False
        ),
    ],
)
def test_load_model_takes_both_forms(call, base, on_disk, folders):
    model, tokenizer = call(str(base), str(on_disk[0]), folders)
    assert isinstance(model, xlora.XLoraModel)
    assert torch.equal(logits(model), on_disk[1])
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token == "</s>"


def test_load_model_follows_its_options(base, on_disk):
    plain, tokenizer = xlora_utils.load_model(
        str(on_disk[0]), dtype=torch.bfloat16, load_xlora=False, padding_side="left"
    )
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert plain.dtype == torch.bfloat16
    assert tokenizer.padding_side == "left"
    model, _ = xlora_utils.load_model(str(base), str(on_disk[0]), "cpu", use_cache=False)
    assert model.config.use_cache is False
    assert model(torch.tensor([[3, 4]])).past_key_values is None
    with pytest.raises(TypeError, match="use_cache: no such argument in this form"):
        xlora_utils.load_model(str(on_disk[0]), "cpu", use_cache=False)


def test_load_model_without_a_base_says_how(saved):
    with pytest.raises(ValueError, match=r"names no base model; use load_model\(base"):
        xlora_utils.load_model(str(saved[0]), "cpu")
