"""A new task from a library: from the nearest expert, from the mean of all, by weights over them, all together."""

import pytest
import torch
from walk import SHORT, SMALL, data, mole

from mole.cli.main import main
from mole.experts import ExpertLibrary, load_expert
from mole.mixtures import mixture_folder, origins_of

STILL = "training.learning_rate=1e-9"


def start(walk, folder, *words, task="reverse"):
    common = [*SMALL, *SHORT, *data(task), f"start_library={walk / 'library'}", f"run.folder={folder}"]
    mole("train-expert", *common, *words)
    return load_expert(folder)


def test_the_nearest_expert_is_the_one_trained_on_such_data(walk, tmp_path):
    for task in ("reverse", "shouting"):
        found = start(walk, tmp_path / task, "experiment=transfer-nearest", STILL, "start_examples=8", task=task)
        assert [row["name"] for row in found.card.derived_from] == [task]
        assert found.card.derived_from[0]["relation"] == "continued"
        original = ExpertLibrary.open(str(walk / "library")).get_expert(task).adapter
        for path, weights in original.modules.items():
            assert (found.adapter.modules[path].B - weights.B).abs().max() < 1e-6


def test_the_mean_starts_from_the_mean_update_of_all(walk, tmp_path):
    found = start(walk, tmp_path / "mean", "experiment=transfer-mean", STILL, "adapter.rank=16")
    assert [row["name"] for row in found.card.derived_from] == ["reverse", "shouting"]
    library = ExpertLibrary.open(str(walk / "library"))
    experts = [library.get_expert(name).adapter for name in ("reverse", "shouting")]
    for path, weights in found.adapter.modules.items():
        mean = sum(one.modules[path].scale * one.modules[path].B @ one.modules[path].A for one in experts) / 2
        torch.testing.assert_close(weights.scale * weights.B @ weights.A, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("experiment", "words"),
    [("transfer-router", []), ("transfer-all", []), ("transfer-poly", ["router.task_names=[sorting]"])],
)
def test_mixtures_for_a_new_task_train(walk, tmp_path, experiment, words):
    common = [*SMALL, *SHORT, *data("sorting"), f"library={walk / 'library'}", f"run.folder={tmp_path / 'run'}"]
    mole("build-moe", *common, f"experiment={experiment}", *words)
    assert list(origins_of(mixture_folder(str(tmp_path / "run")))) == ["reverse", "shouting"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["start=nearest"], "start_library"),
        (["start_library=LIBRARY"], "start=nearest or start=mean"),
        (["start=mean", "start_library=LIBRARY", "expert=LIBRARY/reverse"], "choose one start"),
        (["start=mean", "start_library=LIBRARY", "start_experts=[revers]"], "revers"),
    ],
)
def test_a_start_that_is_none_is_said_before_anything_runs(walk, tmp_path, capsys, words, said):
    words = [word.replace("LIBRARY", str(walk / "library")) for word in words]
    code = main(["train-expert", *SMALL, *SHORT, *data("reverse"), *words, f"run.folder={tmp_path / 'run'}"])
    assert code != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "expert").exists()
