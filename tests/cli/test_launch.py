"""Several processes: one run, failures with their rank, signals, other launchers; and no process outlives it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mole.cli import launch, runs
from mole.command import Command
from mole.log import log_file, start_log
from mole.run_folder import RunFolder, RunStopped

HERE = Path(__file__).parents[1]
TWO = "launcher.num_processes=2"


def start(*words: str, folder: Path, prefix: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
    """The toy command in a process of its own."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MOLE_FULL_ERROR", "OMP_NUM_THREADS")
    }
    env = {**kept, "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore", **environment}
    command = [sys.executable, *prefix, str(HERE / "toy_command.py"), "toy", "topping=cream", *words]
    return subprocess.Popen(command, env=env, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(run: subprocess.Popen, *files: Path) -> None:
    until = time.monotonic() + 120
    while not all(f.is_file() and f.read_text() for f in files):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < until, "it never began to wait"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def record(folder: Path) -> dict:
    return json.loads((folder / "r" / "run.json").read_text())


@pytest.mark.parametrize(
    ("node", "count"),
    [
        ({}, 1),
        ({"launcher": {"num_processes": 3}}, 3),
        ({"launcher": {"num_processes": None}, "backbone": {"device": "cpu"}}, 1),
    ],
)
def test_the_number_of_processes_is_what_the_launcher_says(node, count):
    assert launch.count_processes(node) == count


def test_one_process_is_this_one(tmp_path):
    run = start("run.folder=r", folder=tmp_path, OMP_NUM_THREADS="7")
    run.communicate()
    assert run.returncode == 0
    assert (tmp_path / "r" / "metrics.jsonl").read_text() == '{"rank": 0, "world": 1, "threads": "7"}\n'


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [
        ("wait", signal.SIGTERM, 75),
        pytest.param("wait", signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param("dawdle", signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_signals_stop_one_process_with_a_checkpoint_or_without(tmp_path, name, number, code):
    run = start(f"name={name}", "run.folder=r", folder=tmp_path)
    wait_for(run, tmp_path / "r" / "waiting-0")
    run.send_signal(number)
    _, said = run.communicate(timeout=120)
    assert run.returncode == code, said
    assert "toy --resume" in said
    assert record(tmp_path)["status"] == "stopped"


@pytest.mark.slow
def test_two_processes_run_once_and_share_the_processors(tmp_path):
    run = start(TWO, "run.folder=r", folder=tmp_path)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["rank"] for line in lines) == [0, 1]
    assert {line["world"] for line in lines} == {2}
    assert all(line["threads"] for line in lines)
    assert record(tmp_path)["objective"] == 1.5
    assert record(tmp_path)["processes"] == 2
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["config.yaml", "log.txt", "metrics.jsonl", "run.json"]
    assert "2 processes" in said


@pytest.mark.slow
def test_the_rank_that_failed_is_named_and_every_traceback_kept(tmp_path):
    run = start(TWO, "name=late", "run.folder=r", folder=tmp_path, TOY_TOKEN="hf_verysecret")
    _, said = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "rank 1 failed: RuntimeError: burnt, with <$TOY_TOKEN> in it" in said
    assert "Traceback" not in said
    assert "Traceback" in (tmp_path / "r" / "error.txt").read_text()
    assert record(tmp_path)["status"] == "failed"
    for file in (tmp_path / "r").iterdir():
        assert "hf_verysecret" not in file.read_text()
    assert not list((tmp_path / "r").glob(".*"))


@pytest.mark.slow
def test_an_input_error_of_the_workers_is_the_users(tmp_path):
    run = start(TWO, "name=early", "run.folder=r", folder=tmp_path)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 2
    assert said.splitlines()[-1] == "mole: no flour in the house; buy some"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signals_stop_all_processes(tmp_path, number, code):
    run = start(TWO, "name=wait", "run.folder=r", folder=tmp_path)
    waiting = [tmp_path / "r" / f"waiting-{rank}" for rank in (0, 1)]
    wait_for(run, *waiting)
    run.send_signal(number)
    _, said = run.communicate(timeout=120)
    assert run.returncode == code, said
    assert not any(is_alive(int(file.read_text())) for file in waiting)
    assert record(tmp_path)["status"] == "stopped"


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path):
    run = start(TWO, "name=wait", "run.folder=r", folder=tmp_path)
    waiting = [tmp_path / "r" / f"waiting-{rank}" for rank in (0, 1)]
    wait_for(run, *waiting)
    run.kill()
    run.communicate()
    until = time.monotonic() + 120
    while any(is_alive(int(file.read_text())) for file in waiting):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_sweep_of_several_processes_brings_its_objectives_back(tmp_path):
    run = start(TWO, "training.max_steps=1,2", "-m", "run.folder=s", folder=tmp_path)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    lines = [json.loads(line) for line in (tmp_path / "s-sweep" / "sweep.jsonl").read_text().splitlines()]
    assert [line["objective"] for line in lines] == [0.5, 1.0]


@pytest.mark.slow
def test_torchrun_shares_one_configuration_and_one_folder(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = start(folder=tmp_path, prefix=torchrun)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    folders = list((tmp_path / "outputs" / "toy").iterdir())
    assert len(folders) == 1
    lines = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["rank"] for line in lines) == [0, 1]
    assert json.loads((folders[0] / "run.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_torchrun_with_another_number_of_processes_is_refused(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = start("launcher.num_processes=3", "run.folder=r", folder=tmp_path, prefix=torchrun)
    _, said = run.communicate(timeout=300)
    assert run.returncode != 0
    assert "launcher.num_processes=3, but 2 processes were started" in said
    assert not (tmp_path / "r").exists()


def test_an_error_is_told_without_pythons_dressing():
    assert launch.describe(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory: x"
    assert launch.describe(KeyError("no expert 'a'")) == "no expert 'a'"
    assert launch.describe(ValueError("text")) == "text"
    assert launch.describe(RuntimeError()) == "RuntimeError"


def test_the_log_goes_to_the_runs_file_without_secrets(tmp_path, capsys, monkeypatch):
    import logging

    monkeypatch.setenv("MY_TOKEN", "hf_abcdef")
    start_log(logging.WARNING)
    with log_file(tmp_path / "log.txt"):
        logging.getLogger("mole.training").info("quiet hf_abcdef")
        logging.getLogger("mole.training").warning("loud hf_abcdef")
    assert capsys.readouterr().err == "loud <$MY_TOKEN>\n"
    text = (tmp_path / "log.txt").read_text()
    assert "quiet <$MY_TOKEN>" in text
    assert "hf_abcdef" not in text
    start_log(logging.INFO)


@pytest.mark.parametrize(("raised", "code"), [(RunStopped(2), 130), (RunStopped(15), 143), (KeyboardInterrupt(), 130)])
def test_a_stop_before_the_first_step_leaves_nothing(tmp_path, monkeypatch, raised, code):
    def worker(work):
        raise raised

    monkeypatch.setattr(launch, "run_worker", worker)
    node = {
        "flavour": {"name": "sour", "lemons": 1},
        "topping": {"name": "cream"},
        "launcher": {"name": "auto", "num_processes": 1},
        "training": {"max_steps": 1, "learning_rate": 0.1},
        "run": {"folder": str(tmp_path / "r")},
    }
    outcome = runs.start(runs.Plan(Command("toy", module="toy_command"), node))
    assert outcome.code == code
    assert list(tmp_path.iterdir()) == []


def test_a_stop_with_a_checkpoint_asks_to_be_started_again(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "r")

    def worker(work):
        run.update(status="running")
        run.checkpoint(4).mkdir(parents=True)
        (run.checkpoint(4) / "complete").write_text("")
        raise RunStopped(signal.SIGTERM, run.checkpoint(4))

    monkeypatch.setattr(launch, "run_worker", worker)
    node = {
        "flavour": {"name": "sour"},
        "topping": {"name": "cream"},
        "launcher": {"num_processes": 1},
        "training": {},
        "run": {"folder": str(run.path)},
    }
    outcome = runs.start(runs.Plan(Command("toy", module="toy_command"), node))
    assert (outcome.code, outcome.status) == (75, "stopped")
    assert "continue after step-4 with: mole toy --resume" in outcome.lines[1]
