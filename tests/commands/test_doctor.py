"""`mole doctor`: the machine, runs in every state, and experts."""

import json

import pytest
import torch

from mole.adapters import Adapter, LoraWeights
from mole.cli.main import main
from mole.commands import doctor
from mole.config import saved as saved_config
from mole.experts import BackboneRef, Expert, ExpertLibrary, describe
from mole.run_folder import RunFolder


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "r")
    run.path.mkdir()
    saved_config.write(run.config, {"seed": 0})
    return run


def found(capsys, *words: str) -> tuple[int, dict[str, dict[str, str]]]:
    code = main(["doctor", *words, "--json"])
    return code, {entry["about"]: entry for entry in json.loads(capsys.readouterr().out)}


def test_a_fit_machine_passes_and_nothing_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, findings = found(capsys)
    assert code == 0
    assert findings["torch"]["state"] == "ok"
    assert "GiB" in findings["memory"]["text"]
    assert findings["disk here"]["text"].endswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(doctor.host, "versions", lambda: {"mole": "0", "peft": None})
    code, findings = found(capsys)
    assert code == 1
    assert findings["peft"]["state"] == "wrong"


def test_an_absent_extra_names_its_installation(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"plot": ("no_such_module",)})
    code, findings = found(capsys)
    assert code == 0
    assert findings["extra plot"]["text"] == "absent: no_such_module; pip install 'mole-experts[plot]'"


def test_a_default_file_of_accelerate_is_said_not_to_act(capsys, monkeypatch, tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "is not read" in found(capsys)[1]["accelerate"]["text"]


def test_a_finished_run_has_nothing_to_do(run, capsys):
    run.update(status="finished", command="train-expert")
    code, findings = found(capsys, "r")
    assert code == 0
    assert findings["next"]["text"] == "nothing to do; again: mole train-expert --from r"


def test_a_stopped_run_says_how_it_goes_on_and_what_is_passed_over(run, capsys):
    run.update(status="stopped", command="train-expert", versions={"torch": "1.0"})
    for step in (1, 2):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoint(1) / "complete").write_text("")
    entries = list(doctor.examine_run(run))
    assert [e.text for e in entries if e.about == "checkpoints"] == ["incomplete, passed over: step-2", "step-1"]
    code, findings = found(capsys, "r")
    assert code == 0
    assert "continue: mole train-expert --resume r" in findings["next"]["text"]
    assert "torch 1.0, now" in findings["versions"]["text"]


def test_a_failed_run_shows_its_last_error(run, capsys):
    run.update(status="failed", command="evaluate")
    run.error.write_text("Traceback\n  …\nRuntimeError: burnt\n")
    code, findings = found(capsys, "r")
    assert code == 1
    assert findings["error"]["text"].startswith("RuntimeError: burnt")
    assert "no complete checkpoint" in findings["next"]["text"]


def test_a_folder_that_is_no_run_is_refused(capsys, tmp_path):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err


def test_the_table_has_one_line_for_each_finding(run, capsys):
    run.update(status="finished", command="evaluate")
    assert main(["doctor", "r"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["ok", "status"], ["ok", "next"]]


# ---- experts
def about(capsys, *words):
    code = main(["doctor", *words, "format=json"])
    return code, [(entry["about"], entry["state"], entry["text"]) for entry in json.loads(capsys.readouterr().out)]


def lora(scale=1.0, rank=2, alpha=4.0, *, seed=0, rslora=False, magnitude=False):
    generator = torch.Generator().manual_seed(seed)
    modules = {
        f"model.layers.{layer}.self_attn.q_proj": LoraWeights(
            A=torch.randn(rank, 8, generator=generator),
            B=scale * torch.randn(8, rank, generator=generator),
            alpha=alpha,
            rslora=rslora,
            magnitude=torch.ones(8) if magnitude else None,
        )
        for layer in range(2)
    }
    return Adapter("lora", modules)


@pytest.fixture
def experts(tmp_path):
    library = ExpertLibrary.open(str(tmp_path / "lib"))

    def add(name, adapter, shapes="a" * 64):
        expert = Expert(describe(adapter, BackboneRef("tiny", shapes=shapes)), adapter)
        library.add_expert(expert, name)
        return f"{tmp_path / 'lib'}/{name}"

    return add


def test_sound_experts_pass_and_what_is_unlike_is_noted(experts, tmp_path, capsys):
    experts("one", lora(seed=1))
    experts("two", lora(rank=3, seed=2))
    code, findings = about(capsys, str(tmp_path / "lib"))
    assert code == 0
    assert [entry[:2] for entry in findings] == [("one", "ok"), ("two", "ok"), ("rank", "note")]
    assert findings[2][2] == "not the same for all: 2: one; 3: two"


def test_an_expert_that_learned_nothing_and_one_of_another_backbone_are_wrong(experts, tmp_path, capsys):
    experts("one", lora(seed=1))
    experts("empty", lora(scale=0.0, seed=2))
    experts("other", lora(seed=3), shapes="b" * 64)
    code, findings = about(capsys, str(tmp_path / "lib"))
    assert code == 1
    assert ("empty", "wrong", "it has learned nothing: B is zero in every module") in findings
    assert [state for name, state, _ in findings if name == "backbone shapes"] == ["wrong"]


def test_the_same_expert_twice_and_a_size_out_of_line_are_noted(experts, tmp_path, capsys):
    experts("one", lora(seed=1))
    experts("again", lora(seed=1, scale=1.001))
    experts("large", lora(seed=2, scale=1000.0))
    code, findings = about(capsys, str(tmp_path / "lib"))
    assert code == 0
    notes = {name: text for name, state, text in findings if state == "note"}
    assert "the same expert twice?" in notes["again"]
    assert "median of all" in notes["large"]


def test_a_damaged_expert_is_wrong_and_the_others_are_still_looked_at(experts, tmp_path, capsys):
    experts("one", lora(seed=1))
    experts("two", lora(seed=2))
    weights = tmp_path / "lib" / "one" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    code, findings = about(capsys, str(tmp_path / "lib"))
    assert code == 1
    assert {name: state for name, state, _ in findings} == {"one": "wrong", "two": "ok"}


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        (lora(), None),
        (lora(rslora=True), "format=normalised"),
        (lora(magnitude=True), "does not read it"),
    ],
)
def test_what_a_server_would_make_of_an_expert_is_told(experts, capsys, adapter, says):
    address = experts("one", adapter)
    code, findings = about(capsys, address, "target=vllm")
    assert code == (0 if says is None else 1)
    assert says is None or says in findings[0][2]
    assert about(capsys, address, "target=peft")[0] == 0


def test_a_target_needs_experts(capsys):
    assert main(["doctor", "target=vllm"]) == 2
    assert "name them" in capsys.readouterr().err
