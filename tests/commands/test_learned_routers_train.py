"""`mole build-moe` with every router that learns, and with the presets of learned routers."""

import json

import pytest
from safetensors.torch import load_file
from walk import SHORT, SMALL, data, mole

from mole import routers  # noqa: F401  fills the registry
from mole.mixtures import mixture_folder, origins_of
from mole.registry import ROUTERS

LEARNED = [variant.name for variant in ROUTERS if variant.implementation.learned]
SLOW = pytest.mark.slow  # two short runs each


def build(walk, folder, *words):
    common = [*SMALL, *SHORT, *data("reverse", "shouting"), f"library={walk / 'library'}", f"run.folder={folder}"]
    mole("build-moe", *common, *words)
    return load_file(mixture_folder(str(folder)) / "router.safetensors")


@pytest.mark.parametrize("router", [name if name == "top_k" else pytest.param(name, marks=SLOW) for name in LEARNED])
def test_training_moves_the_router_and_leaves_a_mixture_that_loads(walk, tmp_path, router):
    started = build(walk, tmp_path / "a", f"router={router}", "training.learning_rate=1e-6", *_no_rate(router))
    trained = build(walk, tmp_path / "b", f"router={router}", "training.learning_rate=0.05")
    assert started.keys() == trained.keys()
    assert any((started[name].float() - trained[name].float()).abs().max() > 1e-3 for name in started)
    assert list(origins_of(mixture_folder(str(tmp_path / "b")))) == ["reverse", "shouting"]


def _no_rate(router):
    """Routers with a rate of their own get next to none here."""
    return ["router.lr=1e-6"] if getattr(ROUTERS[router].config(), "lr", None) else []


@pytest.mark.parametrize("preset", ["lora-soups", "mhr-z", "mhr"])
def test_presets_build_and_train(walk, tmp_path, preset):
    state = build(walk, tmp_path / "run", f"experiment={preset}")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    start, end = lines[0], [line for line in lines if line["phase"] == "train"][-1]
    assert (start["step"], start["phase"], end["step"]) == (0, "start", 4)
    shapes = {tuple(tensor.shape) for tensor in state.values()}
    if preset == "lora-soups":
        assert shapes == {(len(state["theta"]), 2)}
        assert len(state["theta"]) > 2
        first, *_ = (name for name in start if name.endswith("/weights"))
        assert start[first] == {"reverse": 0.5, "shouting": 0.5}
        assert list(end[first].values()) == pytest.approx(state["theta"][0].tolist())
        assert end[first] != start[first]
    else:
        assert end["router/discreteness"] < start["router/discreteness"] <= 1 + 1e-6  # float32, of thetas near nought
        assert set(end["router/tasks/sparsity"]) == {"reverse", "shouting"}
        assert shapes == {(2, 4, 2)}  # tasks, blocks, skills
