"""`mole library import` and `export`, end to end: what is printed, what is left, what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mole.adapters import Adapter, BottleneckWeights, LoraWeights, NormWeights, peft_format
from mole.cli.main import main
from mole.experts import BackboneRef, Expert, ExpertLibrary, describe


def adapter(seed=0, rank=2):
    generator = torch.Generator().manual_seed(seed)
    parts = {
        f"model.layers.{n}.q_proj": LoraWeights(
            A=torch.randn(rank, 6, generator=generator), B=torch.randn(4, rank, generator=generator), alpha=4.0
        )
        for n in range(2)
    }
    return Adapter("lora", parts, targets=("q_proj",))


@pytest.fixture
def mole(capsys, tmp_path, monkeypatch):
    """Runs a command line in a folder with a PEFT folder `law`; gives its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "law").mkdir()
    peft_format.write(adapter(), tmp_path / "law", "user/llama")

    def run(*words):
        code = main(["library", *words])
        return (code, *capsys.readouterr())

    return run


def left(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_import_publishes_a_checked_expert(mole, tmp_path):
    code, out, err = mole("import", "law", "lib", "tasks=[law]", "license=mit")
    card = ExpertLibrary.open("lib").card("law")
    assert (code, err) == (0, "")
    assert out == f"imported law (lora, 40 parameters, for user/llama) to lib, revision {card.revision[:8]}\n"
    assert (card.tasks, card.license, card.backbone.name) == (("law",), "mit", "user/llama")
    assert mole("import", "law", "lib")[1] == "unchanged: law is in lib with these weights\n"
    assert mole("verify", "lib")[0] == 0


def test_import_with_dry_run_writes_nothing(mole, tmp_path):
    before = left(tmp_path)
    code, out, _ = mole("import", "law", "lib", "dry_run=true")
    assert (code, out.startswith("would import law (lora")) == (0, True)
    assert left(tmp_path) == before


def test_import_of_a_state_dict_takes_what_the_file_does_not_say(mole, tmp_path):
    A, B = torch.randn(4, 6), torch.randn(8, 2)
    save_file({"h.0.attn.c_attn.lora_A": A, "h.0.attn.c_attn.lora_B": B}, tmp_path / "e2e.safetensors")
    words = ["import", "e2e.safetensors", "lib", "from=loralib", "backbone=gpt2", "alpha=32", "transposed=true"]
    assert "say which blocks are adapted" in mole(*words)[2]
    code, out, _ = mole(*words, "blocks=[true,false,true]")
    assert code == 0
    assert "imported e2e (lora" in out
    (part,) = ExpertLibrary.open("lib")["e2e"].adapter.modules.values()
    assert part.scale == 16.0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("law", "lib", "from=adapterhub"), "no config of AdapterHub"),
        (("law", "lib", "from=pickle"), "from: must be"),
        (("law", "lib", "name=Law"), "how about 'law'"),
        (("nowhere", "lib"), "does not exist"),
        (("law",), "library: required"),
    ],
)
def test_bad_input_to_import_is_told_and_leaves_nothing(mole, tmp_path, words, told):
    before = left(tmp_path)
    code, out, err = mole("import", *words)
    assert (code, out) == (2, "")
    assert told in err
    assert left(tmp_path) == before


def test_a_taken_name_is_told(mole):
    library = ExpertLibrary.open("lib")
    library.add_expert(Expert(describe(adapter(1), BackboneRef("x")), adapter(1)), "law")
    code, _, err = mole("import", "law", "lib")
    assert code == 2
    assert "'law' is taken" in err


@pytest.mark.parametrize("form", ["peft", "normalised"])
def test_export_writes_a_folder(mole, tmp_path, form):
    mole("import", "law", "lib")
    code, out, _ = mole("export", "lib", "law", "out/law", f"format={form}", "dtype=bfloat16")
    revision = ExpertLibrary.open("lib").card("law").revision[:8]
    assert (code, out) == (0, f"wrote law, revision {revision}, as {form} to out/law\n")
    assert left(tmp_path / "out") == {
        f"law/{name}" for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")
    }
    assert peft_format.read(tmp_path / "out" / "law").dtype == torch.bfloat16


def test_what_was_exported_comes_back_with_the_same_content(mole):
    mole("import", "law", "lib")
    assert mole("export", "lib", "law", "out/law")[0] == 0
    assert mole("import", "out/law", "lib")[1] == "unchanged: law is in lib with these weights\n"


def test_an_export_names_the_backbone_where_it_lies(mole, tmp_path):
    mole("import", "law", "lib", "backbone=llama")
    (tmp_path / "hf").mkdir()
    for given, found in (("hf", str(tmp_path / "hf")), ("user/other", "user/other")):
        assert mole("export", "lib", "law", f"out/{found[-2:]}", f"backbone={given}")[0] == 0
        config = json.loads((tmp_path / "out" / found[-2:] / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == found
    code, _, err = mole("export", "lib", "law", "out/card", "backbone=hf", "card=true")
    assert (code, "a card names no places" in err) == (2, True)


def test_export_of_several_is_a_map_of_pinned_addresses(mole, tmp_path):
    mole("import", "law", "lib")
    mole("import", "law", "lib", "name=bio")
    code, out, _ = mole("export", "library=lib", "name=[bio,law]", "dest=experts.json", "format=adapter-weights")
    assert (code, out) == (0, "wrote 2 addresses (bio, law) to experts.json\n")
    found = json.loads((tmp_path / "experts.json").read_text())
    assert found["law"] == f"{tmp_path}/lib/law@{ExpertLibrary.open('lib').card('law').revision}"
    assert mole("export", "lib", "*", "experts.json", "format=adapter-weights")[0] == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("lib", "lw", "out"), "did you mean law"),
        (("lib", "law", "law"), "choose a new folder"),
        (("library=lib", "name=[law,bio]", "dest=out"), "exported as format=adapter-weights alone"),
        (("lib", "law", "out", "format=adapterhub"), "wants the backbone's model_type and width"),
        (("lib", "law", "out", "format=adapterhub", "model_type=llama", "width=6"), "holds bottlenecks"),
        (("lib", "law", "out", "width=6"), "are for format=adapterhub"),
        (("lib", "law", "out", "dtype=int8"), "dtype: must be"),
    ],
)
def test_bad_input_to_export_is_told_and_leaves_nothing(mole, tmp_path, words, told):
    mole("import", "law", "lib")
    before = left(tmp_path)
    code, out, err = mole("export", *words)
    assert (code, out) == (2, "")
    assert told in err
    assert left(tmp_path) == before


def test_export_with_dry_run_says_what_it_would_write(mole, tmp_path):
    mole("import", "law", "lib")
    code, out, _ = mole("export", "lib", "law", "out", "dry_run=true")
    assert code == 0
    assert out.startswith("would write law, revision")
    assert "(adapter_config.json, adapter_model.safetensors, README.md)" in out
    assert not (tmp_path / "out").exists()


def bottlenecks(path="bert.encoder.layer"):
    """An expert for a BERT of two blocks: both sub-layers, all norms, pooler and classifier."""
    generator = torch.Generator().manual_seed(3)
    modules = {}
    for n in range(2):
        for end in ("attention.output", "output"):
            shapes = ((2, 8), (2,), (8, 2), (8,))
            parts = [torch.randn(*shape, generator=generator) for shape in shapes]
            modules[f"{path}.{n}.{end}"] = BottleneckWeights(*parts, activation="gelu", reads="h")
            norm = [torch.randn(8, generator=generator) for _ in range(2)]
            modules[f"{path}.{n}.{end}.LayerNorm"] = NormWeights(*norm)
    head = {
        "bert.pooler": {
            "dense.weight": torch.randn(8, 8, generator=generator),
            "dense.bias": torch.randn(8, generator=generator),
        },
        "classifier": {
            "weight": torch.randn(2, 8, generator=generator),
            "bias": torch.randn(2, generator=generator),
        },
    }
    return Adapter("bottleneck", modules, task_type="SEQ_CLS", full_modules=head, full_names=("pooler", "classifier"))


@pytest.fixture
def rte(mole):
    head = {"type": "classification", "labels": ["entailment", "not_entailment"]}
    card = describe(bottlenecks(), BackboneRef("user/bert"), head=head, tasks=["rte"])
    ExpertLibrary.open("lib").add_expert(Expert(card, bottlenecks()), "rte")
    return ("lib", "rte", "out", "format=adapterhub", "model_type=bert", "width=8")


def test_norms_have_no_place_in_adapterhubs_folder_and_are_left_out_on_request(mole, rte, tmp_path):
    code, out, err = mole("export", *rte)
    assert (code, out) == (2, "")
    assert "no place for 4 trained norms: allow_partial=true leaves them out" in err
    assert not (tmp_path / "out").exists()
    code, out, _ = mole("export", *rte, "allow_partial=true")
    revision = ExpertLibrary.open("lib").card("rte").revision[:8]
    assert (code, out) == (0, f"wrote rte, revision {revision}, as adapterhub to out without 4 trained norms\n")
    assert left(tmp_path / "out") == {
        "README.md",
        "adapter.safetensors",
        "adapter_config.json",
        "head_config.json",
        "model_head.safetensors",
    }


def test_bottlenecks_and_head_come_back_from_adapterhubs_folder_as_they_were(mole, rte):
    assert mole("export", *rte, "allow_partial=true")[0] == 0
    assert mole("import", "out", "lib", "name=again", "heads=true")[0] == 0
    card, first = ExpertLibrary.open("lib").card("again"), ExpertLibrary.open("lib")["rte"].adapter.tensors()
    assert card.head == {"type": "classification", "labels": ["entailment", "not_entailment"]}
    assert card.backbone.name == "user/bert"
    again = ExpertLibrary.open("lib")["again"].adapter.tensors()
    assert again.keys() == {name for name in first if "LayerNorm" not in name}
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())
    assert mole("export", "lib", "again", "twice", *rte[3:])[0] == 0
    assert mole("import", "twice", "lib", "name=again", "heads=true")[1].startswith("unchanged: again")


def test_a_head_stays_where_it_is_unless_it_is_asked_for(mole, rte):
    mole("export", *rte, "allow_partial=true")
    assert mole("import", "out", "lib", "name=again")[0] == 0
    library = ExpertLibrary.open("lib")
    assert library.card("again").head is None
    assert not library["again"].adapter.full_modules


def test_a_head_that_is_not_there_and_one_that_has_no_place_are_told(mole, rte, tmp_path):
    mole("export", *rte, "allow_partial=true")
    (tmp_path / "out" / "model_head.safetensors").unlink()
    code, _, err = mole("import", "out", "lib", "name=again", "heads=true")
    assert code == 2
    assert "heads=true, and out has no model_head.safetensors" in err
    err = mole("export", *rte[:2], "other", rte[3], "model_type=roberta", "width=8")[2]
    assert "no place for 4 trained norms, bert.pooler, classifier" in err


def test_blocks_that_the_expert_leaves_out_are_in_the_config(mole, rte, tmp_path):
    assert mole("export", *rte, "allow_partial=true", "num_layers=4", "dry_run=true")[0] == 0
    assert mole("export", *rte, "allow_partial=true", "num_layers=4")[0] == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["config"]
    assert config["leave_out"] == [2, 3]
    assert "allow_partial are for format=adapterhub" in mole("export", "lib", "rte", "x", "allow_partial=true")[2]


def test_a_fusion_is_no_expert_and_the_way_it_is_used_is_told(mole, tmp_path):
    (tmp_path / "fused").mkdir()
    for name in ("adapter_fusion_config.json", "model_adapter_fusion.safetensors"):
        (tmp_path / "fused" / name).write_bytes(b"{}")
    code, _, err = mole("import", "fused", "lib")
    assert code == 2
    assert "router=adapter_fusion" in err
    assert "router.from_folder" in err
