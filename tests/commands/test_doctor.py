"""`mole doctor`: the machine, and runs in every state."""

import json

import pytest

from mole.cli.main import main
from mole.commands import doctor
from mole.config import saved as saved_config
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
