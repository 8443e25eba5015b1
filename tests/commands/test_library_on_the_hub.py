"""The verbs of `mole library` over a Hub on this machine: what is copied, in how many commits and requests."""

import subprocess

import pytest
import torch
from hub_server.fixtures import ALICE, hub, hub_process, repo_id

from mole.adapters import Adapter, LoraWeights
from mole.cli.main import main
from mole.experts import BackboneRef, Expert, ExpertLibrary, HFExpertLibrary, describe

__all__ = ["hub", "hub_process", "repo_id"]


def make_expert(seed, **facts):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator)
    adapter = Adapter("lora", {"model.layers.0.mlp.up_proj": LoraWeights(A=A, B=B, alpha=4.0)}, targets=("up_proj",))
    return Expert(describe(adapter, BackboneRef("user/tiny"), **{"tasks": ["sums"], **facts}), adapter)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOLE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def lib():
    library = ExpertLibrary.open("lib")
    for seed, name in enumerate("abc"):
        library.add_expert(make_expert(seed, license="mit"), name)
    return library


@pytest.fixture
def far(hub, repo_id):
    return f"hf://{repo_id}"


@pytest.fixture
def mole(capsys):
    """Runs a command line; gives its exit code, what it printed, and what it printed to stderr."""

    def run(*words):
        code = main(["library", *words])
        out, err = capsys.readouterr()
        assert ALICE not in out + err
        return code, out, err

    return run


def titles(hub, repo_id):
    """The titles of all commits, newest first."""
    folder = hub.repo(repo_id).path
    return subprocess.run(
        ["git", "log", "--format=%s", "main"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def requests(hub, work):
    hub.requests.clear()
    work()
    return len(hub.seen("/api/models|/resolve/"))


@pytest.fixture
def pushed(mole, lib, far):
    assert mole("push", "lib", far, "create=true")[0] == 0
    return far


def test_push_makes_one_commit_with_a_page_and_again_none(mole, lib, far, hub, repo_id):
    code, out, err = mole("push", "lib", far)
    assert code == 2
    assert "Traceback" not in err
    assert mole("push", "lib", far, "create=true", "dry_run=true")[1].endswith("3 to copy, 0 equal, 0 skipped\n")
    assert hub.repo(repo_id) is None
    code, out, err = mole("push", "lib", far, "create=true", "message=Nightly")
    assert (code, err) == (0, "")
    assert out.count("added ") == 3
    assert titles(hub, repo_id)[0] == "Nightly"
    before = titles(hub, repo_id)
    there = HFExpertLibrary(repo_id)
    assert there.cards() == lib.cards()
    page = there.backend.readme()
    assert 'license: "mit"' in page
    assert "| a | sums |" in page
    assert str(lib.backend.root) not in page
    assert requests(hub, lambda: mole("push", "lib", far)) == 1
    assert titles(hub, repo_id) == before


def test_without_a_licence_a_push_says_so(mole, far):
    ExpertLibrary.open("bare").add_expert(make_expert(0), "a")
    code, _, err = mole("push", "bare", far, "create=true")
    assert code == 0
    assert err.startswith("no licence given: a;")


def test_pull_is_what_was_pushed_and_again_nothing(mole, lib, pushed, hub):
    assert mole("pull", pushed, "copy")[1].endswith("3 copied, 0 equal, 0 skipped\n")
    assert ExpertLibrary.open("copy").cards() == lib.cards()
    assert mole("verify", "copy")[0] == 0
    assert requests(hub, lambda: mole("pull", pushed, "copy")) == 1


def test_a_listing_of_what_has_not_changed_is_one_request(mole, lib, pushed, hub):
    assert mole("list", pushed, "format=names")[1] == "a\nb\nc\n"
    assert requests(hub, lambda: mole("list", pushed, "format=names")) == 1
    lib.edit_card("b", tags=["x"])
    mole("push", "lib", pushed)
    assert requests(hub, lambda: mole("list", pushed, "where.tags=x")) <= 6
    assert mole("list", pushed, "where.tags=x", "format=names")[1] == "b\n"


def test_the_verbs_that_change_experts_work_there(mole, pushed, hub, repo_id):
    there = HFExpertLibrary(repo_id)
    first = there.card("a")
    commits = len(titles(hub, repo_id))
    assert mole("edit", pushed, "a", "set.tags=[x]")[1].startswith(f"edited a in {pushed}")
    assert mole("rename", pushed, "b", "z")[1].startswith(f"renamed z in {pushed}")
    make_expert(7).save("next")
    assert mole("update", pushed, "c", "next", "message=more")[0] == 0
    assert mole("restore", pushed, f"a@{first.revision[:8]}")[0] == 0
    assert len(titles(hub, repo_id)) == commits + 4
    assert there.names() == ["a", "c", "z"]
    assert there.card("a").content == first.content
    assert there.history("c")[0]["message"] == "more"
    assert mole("get", pushed, "z", "out/z")[0] == 0
    code, out, _ = mole("remove", pushed, "a", "z", "yes=true")
    assert code == 0
    assert "its files stay in the history of the repository, for good" in out
    assert len(titles(hub, repo_id)) == commits + 5
    assert there.names() == ["c"]
    assert mole("verify", pushed)[0] == 0


def test_clone_takes_artefacts_and_old_revisions_along(mole, lib, far, repo_id):
    lib.artefact("a", "numbers", {"k": 2}, lambda: {"x": [1]})
    first = lib.card("a")
    lib.update_expert("a", make_expert(7))
    assert mole("clone", "lib", far, "history=true", "create=true")[0] == 0
    there = HFExpertLibrary(repo_id)
    assert there.cards() == lib.cards()
    assert there.card("a", first.revision) == first
    assert mole("clone", far, "copy", "history=true")[0] == 0
    copy = ExpertLibrary.open("copy")
    assert copy.cards() == lib.cards()
    assert copy.card("a", first.revision) == first


def test_artefacts_are_kept_there_and_go_with_their_expert(mole, pushed, repo_id):
    there = HFExpertLibrary(repo_id)
    assert there.artefact("a", "numbers", {}, lambda: {"w": torch.ones(3)})["w"].tolist() == [1, 1, 1]
    assert HFExpertLibrary(repo_id).artefact("a", "numbers", {})["w"].tolist() == [1, 1, 1]
    assert mole("artefacts", pushed, "format=names")[1].count(".numbers.") == 1
    assert there.names() == ["a", "b", "c"]
    there.remove_expert("a")
    assert there.artefacts() == []


def test_sync_and_diff_go_both_ways(mole, lib, pushed, repo_id):
    there = HFExpertLibrary(repo_id)
    assert mole("sync", "lib", pushed)[1].endswith("3 equal, 0 conflicts\n")
    there.edit_card("a", tags=["theirs"])
    lib.add_expert(make_expert(7), "mine")
    assert mole("diff", "lib", pushed, "format=names")[1] == "a\nmine\n"
    assert mole("sync", "lib", pushed)[0] == 0
    assert lib.cards() == HFExpertLibrary(repo_id).cards()
    there.edit_card("b", tags=["theirs"])
    lib.edit_card("b", tags=["mine"])
    assert mole("sync", "lib", pushed)[0] == 1


def test_the_page_keeps_what_its_owner_wrote(mole, lib, pushed, repo_id):
    there = HFExpertLibrary(repo_id)
    text = there.backend.readme()
    with there.batch("Mine", readme=text.replace("# A library of experts", "# Mine\n\nWith love.")):
        pass
    lib.edit_card("a", tasks=["other sums"])
    mole("push", "lib", pushed)
    page = there.backend.readme()
    assert "With love." in page
    assert "other sums" in page
    there.rename_expert("a", "y")
    assert "| a |" in there.backend.readme()
    assert mole("readme", pushed)[0] == 0
    assert "| y |" in there.backend.readme()
    assert "With love." in there.backend.readme()


def test_a_tag_and_a_commit_can_be_read_and_not_written(mole, lib, pushed, hub, repo_id):
    commit = HFExpertLibrary(repo_id).backend.head()
    lib.edit_card("a", tags=["x"])
    mole("push", "lib", pushed)
    assert mole("list", f"{pushed}@{commit}", "where.names=a", "format=names")[1] == "a\n"
    assert ExpertLibrary.open(f"{pushed}@{commit}").card("a").tags == ()
    code, _, err = mole("push", "lib", f"{pushed}@{commit}")
    assert code == 2
    assert "never changes" in err


def test_what_was_fetched_once_is_not_fetched_again(mole, pushed, hub):
    assert mole("get", pushed, "a", "one")[0] == 0
    hub.requests.clear()
    assert mole("get", pushed, "a", "two")[0] == 0
    assert hub.seen("safetensors") == []
