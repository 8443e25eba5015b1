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


ON = [*SMALL, *SHORT, *data("reverse", "sorting"), "router=top_k", "training.learning_rate=1e-9"]


def factors(model, name):
    return torch.cat([w.A.flatten() for w in model.adapters()[name].modules.values()])


def test_training_goes_on_from_a_changed_mixture_and_its_own_experts(grown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no library
    mole("build-moe", *ON, f"start_from={grown / 'three'}", f"run.folder={grown / 'further'}")
    before, after = opened(grown / "three"), opened(grown / "further")
    assert after.expert_names == before.expert_names == ("reverse", "shouting", "sorting")
    for site, state in states(before).items():
        assert (states(after)[site]["score.weight"] - state["score.weight"]).abs().max() < 1e-6


def test_experts_that_were_trained_in_the_mixture_go_on_as_they_are(grown, tmp_path):
    first = [*SMALL, *SHORT, *data("reverse", "shouting"), "router=top_k", "train=both"]
    words = [*first, "training.learning_rate=0.05", f"library={grown / 'library'}", "experts=[reverse,shouting]"]
    mole("build-moe", *words, f"run.folder={tmp_path / 'both'}")
    mole(
        "build-moe",
        *ON,
        "experts=[shouting,reverse]",
        f"start_from={tmp_path / 'both'}",
        f"run.folder={tmp_path / 'on'}",
    )
    untrained, trained, on = (opened(place) for place in (grown / "two", tmp_path / "both", tmp_path / "on"))
    assert on.expert_names == ("shouting", "reverse")
    assert torch.equal(factors(on, "reverse"), factors(trained, "reverse"))
    assert not torch.allclose(factors(on, "reverse"), factors(untrained, "reverse"))


def test_settings_that_leave_the_router_s_shape_may_differ_and_others_are_named(grown, tmp_path, capsys):
    words = [*ON, f"start_from={grown / 'three'}"]
    free = ["router.lr=1e-9", "router.noise=learned", "router.temperature=2", "router.expert_dropout=0.1"]
    mole("build-moe", *words, *free, f"run.folder={tmp_path / 'free'}")
    after = opened(tmp_path / "free")
    for site, state in states(opened(grown / "three")).items():
        assert (states(after)[site]["score.weight"] - state["score.weight"]).abs().max() < 1e-6
    assert main(["build-moe", *words, "router.bias=true", "router.scope=block", f"run.folder={tmp_path / 'no'}"]) == 2
    said = capsys.readouterr().err
    assert "router.scope=layer, router.bias=false, and scope=block, bias=true is given" in said
    assert main(["build-moe", *words, "router=rkhs", f"run.folder={tmp_path / 'no'}"]) == 2
    assert "set router=top_k" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["experts=[reverse,sorting]"], ["library=LIBRARY"]])
def test_experts_that_the_mixture_lacks_are_refused(grown, tmp_path, capsys, words):
    words = [word.replace("LIBRARY", str(grown / "library")) for word in words]
    assert main(["build-moe", *ON, *words, f"start_from={grown / 'two'}", f"run.folder={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "no expert sorting (it has reverse, shouting)" in said
    assert f"mole edit-moe {grown / 'two'} library=… add=[sorting]" in said
    assert not (tmp_path / "run").exists()


def test_a_new_task_gets_a_row_of_its_own_and_leaves_the_others_as_they_are(grown, tmp_path):
    first = [*SMALL, *SHORT, *data("reverse", "shouting"), "router=poly", f"library={grown / 'library'}"]
    rows = "router.task_names=[reverse,shouting]"
    mole("build-moe", *first, "experts=[reverse,shouting]", rows, f"run.folder={tmp_path / 'mhr'}")
    words = [*SMALL, *SHORT, *data("reverse", "sorting"), "router=poly", "router.lr=1e-9"]
    more = ["router.task_names=[reverse,shouting,sorting]", "router.init_task={sorting: reverse}"]
    mole("build-moe", *words, *more, f"start_from={tmp_path / 'mhr'}", f"run.folder={tmp_path / 'more'}")
    before, after = states(opened(tmp_path / "mhr")), states(opened(tmp_path / "more"))
    for site, state in before.items():
        torch.testing.assert_close(after[site]["table"][:2], state["table"], rtol=0, atol=1e-6)
        assert after[site]["table"][2, 0].tolist() == pytest.approx([4.0, -4.0], abs=1e-6)


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
    assert main(["edit-moe", *SMALL, str(grown / "three"), *words]) == 2
    assert "router.top_k=2 with 1 experts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("router", ["average_activation", pytest.param("phatgoose", marks=pytest.mark.slow)])
def test_a_router_that_knows_experts_by_data_learns_of_new_ones_from_data(grown, tmp_path, capsys, router):
    library, short = f"library={grown / 'library'}", ["router.gate_steps=4"] if router == "phatgoose" else []
    words = [*SMALL, *data("reverse", "shouting"), f"router={router}", "experts=[reverse,shouting]", library, *short]
    mole("build-moe", *words, "log_examples=0", f"run.folder={tmp_path / 'two'}")
    words = [*SMALL, str(tmp_path / "two"), library, "add=[sorting]", f"run.folder={tmp_path / 'three'}"]
    for given, said in [
        ([], "has none for sorting: give mole edit-moe a dataset of their tasks, or build the mixture anew"),
        (data("reverse"), "there is none for 'sorting'"),
    ]:
        assert main(["edit-moe", *words, *given]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "three").exists()
    mole("edit-moe", *words, *data("sorting"))
    two, three = states(opened(tmp_path / "two")), states(opened(tmp_path / "three"))
    for site, state in two.items():
        assert torch.equal(three[site]["prototypes"][:2], state["prototypes"])
        assert three[site]["prototypes"][2].any()
        assert three[site]["present"].tolist() == [True] * 3


def test_data_is_refused_where_the_router_is_shown_none(grown, tmp_path, capsys):
    words = [*SMALL, str(grown / "two"), f"library={grown / 'library'}", "add=[sorting]", *data("sorting")]
    assert main(["edit-moe", *words, f"run.folder={tmp_path / 'run'}"]) == 2
    assert "dataset: router=top_k is shown no data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
