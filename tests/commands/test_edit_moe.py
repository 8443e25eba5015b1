"""mole edit-moe: experts come, go and are replaced; the router keeps what it learned about the others."""

import shutil

import pytest
import torch
from walk import SHORT, SMALL, data, mole, train

from mole import backbones
from mole.backbones.tiny_backbone import TinyConfig
from mole.cli.main import main
from mole.mixtures import load_mixture, mixture_folder

IDS = torch.tensor([[3, 17, 5, 9, 44]])


def opened(place):
    return load_mixture(mixture_folder(str(place)), backbones.load(TinyConfig(device="cpu")))


def edit(place, *words):
    mole("edit-moe", *SMALL, str(place), *words)


@pytest.fixture(scope="module")
def grown(walk, tmp_path_factory):
    """A library with a third expert, a trained top_k mixture of the first two, and one with the third added."""
    root = tmp_path_factory.mktemp("grown")
    library = root / "library"
    shutil.copytree(walk / "library", library)
    train("sorting", library, root / "sorting")
    words = [*SMALL, *SHORT, *data("reverse", "shouting"), "router=top_k", "experts=[reverse,shouting]"]
    mole("build-moe", *words, f"library={library}", f"run.folder={root / 'two'}")
    edit(root / "two", f"library={library}", "add=[sorting]", f"run.folder={root / 'three'}")
    return root


def states(model):
    return {site: router.state_dict() for site, router in model.routers().items()}


def test_a_new_expert_leaves_the_scores_of_the_others_bit_equal(grown):
    two, three = opened(grown / "two"), opened(grown / "three")
    assert three.expert_names == ("reverse", "shouting", "sorting")
    for site, state in states(two).items():
        assert torch.equal(states(three)[site]["score.weight"][:2], state["score.weight"])
        assert not torch.equal(states(three)[site]["score.weight"][2], torch.zeros(three.config.hidden_size))


def test_adding_and_removing_again_gives_the_mixture_back(grown):
    edit(grown / "three", "remove=[sorting]", f"run.folder={grown / 'back'}")
    two, back = opened(grown / "two"), opened(grown / "back")
    assert back.expert_names == two.expert_names
    with torch.no_grad():
        assert torch.equal(two(input_ids=IDS).logits, back(input_ids=IDS).logits)


def test_a_replaced_expert_is_the_library_s_present_one_under_the_router_that_was(grown):
    library = grown / "other"
    shutil.copytree(grown / "library", library)
    shutil.rmtree(library / "reverse")
    train("reverse", library, grown / "reverse-again", "training.max_steps=6")
    edit(grown / "three", f"library={library}", "replace=[reverse]", f"run.folder={grown / 'replaced'}")
    before, after = opened(grown / "three"), opened(grown / "replaced")
    assert after.expert_names == before.expert_names
    for site, state in states(before).items():
        assert torch.equal(states(after)[site]["score.weight"], state["score.weight"])
    parts = [model.adapters()["reverse"].modules for model in (before, after)]
    assert any(not torch.equal(parts[0][path].B, parts[1][path].B) for path in parts[0])


def test_training_goes_on_from_a_changed_mixture(grown):
    words = [*SMALL, *SHORT, *data("reverse", "sorting"), "router=top_k", f"library={grown / 'library'}"]
    start = ["experts=[reverse,shouting,sorting]", f"start_from={grown / 'three'}", "training.learning_rate=1e-9"]
    mole("build-moe", *words, *start, f"run.folder={grown / 'further'}")
    before, after = opened(grown / "three"), opened(grown / "further")
    for site, state in states(before).items():
        assert (states(after)[site]["score.weight"] - state["score.weight"]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to change"),
        (["add=[sorting]"], "library"),
        (["remove=[revers]"], "did you mean reverse?"),
        (["remove=[reverse,shouting,sorting]"], "at least one expert"),
        (["add=[reverse]", "library=LIBRARY"], "replace="),
        (["remove=[reverse]", "replace=[reverse]", "library=LIBRARY"], "named twice"),
    ],
)
def test_bad_input_is_said_and_leaves_nothing(grown, tmp_path, capsys, words, said):
    words = [word.replace("LIBRARY", str(grown / "library")) for word in words]
    code = main(["edit-moe", *SMALL, str(grown / "three"), *words, f"run.folder={tmp_path / 'run'}"])
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "mixture").exists()


def test_a_router_that_does_not_fit_the_experts_left_is_refused(grown, tmp_path, capsys):
    words = ["remove=[reverse,shouting]", f"run.folder={tmp_path / 'run'}"]
    assert main(["edit-moe", *SMALL, str(grown / "three"), *words]) == 1
    assert "router.top_k=2 with 1 experts" in capsys.readouterr().err
    assert not (tmp_path / "run" / "mixture").exists()
