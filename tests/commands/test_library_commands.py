"""`mole library …` end to end: what is printed, which files are left, which code is returned."""

import json

import pytest
import torch

from mole.adapters import Adapter, LoraWeights
from mole.cli.main import main
from mole.experts import BackboneRef, Expert, ExpertLibrary, describe, load_expert


def make_expert(seed, task, **facts):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator)
    adapter = Adapter("lora", {"model.layers.0.mlp.up_proj": LoraWeights(A=A, B=B, alpha=4.0)}, targets=("up_proj",))
    score = {"metric": "exact_match", "value": 0.5 + seed / 10, "task": task, "dataset": None, "split": "validation"}
    scores = [{**score, "examples": 9, "higher_is_better": True, "config": None}]
    return Expert(describe(adapter, BackboneRef("mole/tiny"), tasks=[task], scores=scores, **facts), adapter)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, task in enumerate(("sums", "Odd Words")):
        make_expert(seed, task).save(tmp_path / f"expert-{seed}")


@pytest.fixture
def mole(capsys):
    """Runs a command line; gives its exit code, what it printed, and what it printed to stderr."""

    def run(*words):
        code = main(["library", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def filled(mole):
    assert mole("add", "lib", "expert-0")[0] == mole("add", "lib", "expert-1")[0] == 0
    return "lib"


def names():
    return ExpertLibrary.open("lib").names()


def test_add_publishes_and_says_so(mole, tmp_path):
    revision = load_expert("expert-0").revision[:8]
    assert mole("add", "lib", "expert-0") == (0, f"added sums to lib, revision {revision}\n", "")
    assert mole("add", "lib", "expert-0") == (0, f"unchanged: sums is in lib at revision {revision}\n", "")
    files = {str(path.relative_to(tmp_path)) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    parts = ("README.md", "adapter_config.json", "adapter_model.safetensors", "expert.json")
    assert files == {"lib/.mole/lock", *(f"lib/sums/{part}" for part in parts)}


def test_add_makes_a_name_of_the_only_task_and_completes_the_card(mole):
    code, out, _ = mole(
        "add", "lib", "expert-1", "tasks=[a b]", "tags=[en]", "license=mit", "description=Turns words.", "message=first"
    )
    assert code == 0
    assert out.startswith("added a-b to lib")
    card = ExpertLibrary.open("lib").card("a-b")
    assert (card.tasks, card.tags, card.license, card.message) == (("a b",), ("en",), "mit", "first")
    assert card.description == "Turns words."
    assert card.content == load_expert("expert-1").card.content


def test_add_takes_the_name_that_is_given(mole):
    assert mole("add", "lib", "expert-0", "name=other")[0] == 0
    assert names() == ["other"]


def test_add_with_dry_run_checks_and_writes_nothing(mole, tmp_path):
    code, out, _ = mole("add", "lib", "expert-0", "dry_run=true")
    assert (code, out.startswith("would add sums")) == (0, True)
    assert not (tmp_path / "lib").exists()
    weights = tmp_path / "expert-0" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert mole("add", "lib", "expert-0", "dry_run=true")[0] == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("lib", "expert-0", "name=My Name"), "how about 'my-name'"),
        (("lib", "nowhere/x"), "no library there: nowhere does not exist"),
        (("lib", "expert-0", "tags=[No Tag]"), "tags[0]: must be a tag"),
        (("lib", "expert-0", "nme=x"), "did you mean name?"),
        (("ftp://bucket/x", "expert-0"), "unknown kind of library 'ftp://'"),
        (("expert-0/expert.json", "expert-0"), "is a file"),
        (("lib",), "folder: required"),
    ],
)
def test_bad_input_to_add_is_told_in_a_line_and_leaves_nothing(mole, tmp_path, words, told):
    before = sorted(map(str, tmp_path.rglob("*")))
    code, out, err = mole("add", *words)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_taken_name_is_told_with_what_to_do(mole, filled):
    code, _, err = mole("add", filled, "expert-1", "name=sums")
    assert code == 2
    assert "'sums' is taken in lib" in err
    assert "choose another name (name=…)" in err
    assert names() == ["odd-words", "sums"]


def test_damaged_weights_are_told(mole, tmp_path):
    weights = tmp_path / "expert-0" / "adapter_model.safetensors"
    weights.write_bytes(b"PK" + weights.read_bytes()[2:])
    code, _, err = mole("add", "lib", "expert-0")
    assert code == 2
    assert "adapter_model.safetensors is not what the card says" in err
    assert not (tmp_path / "lib" / "sums").exists()


def test_list_prints_a_line_for_each_expert(mole, filled):
    code, out, _ = mole("list", filled)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["name", "backbone", "method", "rank", "tasks", "score", "size", "revision"]
    assert [line.split("  ")[0] for line in lines[1:]] == ["odd-words", "sums"]
    assert "mole/tiny" in lines[2]
    assert "exact_match 0.5" in lines[2]
    assert lines[2].endswith(load_expert("expert-0").revision[:8])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ((), ["odd-words", "sums"]),
        (("sort=score",), ["odd-words", "sums"]),
        (("limit=1",), ["odd-words"]),
        (("where.tasks=sums",), ["sums"]),
        (("where.names=[sums,odd-*]",), ["odd-words", "sums"]),
    ],
)
def test_list_filters_sorts_and_limits(mole, filled, words, found):
    assert mole("list", filled, "format=names", *words) == (0, "".join(f"{name}\n" for name in found), "")


def test_list_as_json_holds_whole_cards(mole, filled):
    for way in ("format=json", "--json"):
        rows = json.loads(mole("list", filled, way)[1])
        assert [row["name"] for row in rows] == ["odd-words", "sums"]
        assert rows[1]["revision"] == load_expert("expert-0").revision


def test_list_shows_the_sound_ones_beside_a_damaged_card(mole, filled, tmp_path):
    (tmp_path / "lib" / "sums" / "expert.json").write_text("{}")
    code, out, err = mole("list", filled, "format=names")
    assert (code, out) == (0, "odd-words\n")
    assert err.startswith("damaged: lib/sums: format")


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_a_library_that_is_not_there_is_told(mole, tmp_path, verb):
    code, out, err = mole(verb, "nowhere")
    assert (code, out) == (2, "")
    assert "no library there: nowhere does not exist" in err
    assert not (tmp_path / "nowhere").exists()


def test_a_library_with_nothing_in_it_says_so(mole, filled):
    mole("remove", filled, "sums", "odd-words", "yes=true")
    assert "has no expert yet" in mole("list", filled)[1]


def test_show_prints_the_card(mole, filled):
    code, out, _ = mole("show", filled, "sums")
    rows = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    assert code == 0
    assert rows["backbone"].strip() == "mole/tiny"
    assert rows["revision"].strip() == load_expert("expert-0").revision
    assert json.loads(mole("show", filled, "sums", "format=json")[1]) == load_expert("expert-0").card.to_dict()
    assert mole("show", filled, "sums", "format=names")[1] == "adapter_config.json\nadapter_model.safetensors\n"


def test_show_of_an_unknown_expert_names_a_near_one(mole, filled):
    code, _, err = mole("show", filled, "sum")
    assert code == 2
    assert "unknown expert 'sum'; did you mean sums? (known: odd-words, sums)" in err


def test_get_writes_the_same_expert(mole, filled, tmp_path):
    assert mole("get", filled, "sums", "out/sums")[0] == 0
    for path in (tmp_path / "expert-0").iterdir():
        assert (tmp_path / "out" / "sums" / path.name).read_bytes() == path.read_bytes()
    code, _, err = mole("get", filled, "sums", "out/sums")
    assert code == 2
    assert "not empty; choose a new folder" in err


def test_get_of_damage_writes_nothing(mole, filled, tmp_path):
    weights = tmp_path / "lib" / "sums" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, _, err = mole("get", filled, "sums", "out")
    assert code == 2
    assert "bytes instead of" in err
    assert not (tmp_path / "out").exists()


def test_remove_asks_or_wants_yes(mole, filled):
    code, _, err = mole("remove", filled, "sums")
    assert code == 2
    assert "add yes=true" in err
    assert mole("remove", filled, "sums", "dry_run=true")[1].startswith("would remove sums from lib")
    assert names() == ["odd-words", "sums"]
    code, out, _ = mole("remove", filled, "sums", "yes=true")
    assert code == 0
    assert out.startswith("removed sums from lib, revision")
    assert names() == ["odd-words"]


def test_remove_of_several_wants_all_of_them_to_be_there(mole, filled):
    code, _, err = mole("remove", filled, "sums", "smus", "yes=true")
    assert code == 2
    assert "did you mean sums" in err
    assert names() == ["odd-words", "sums"]
    assert mole("remove", filled, "sums", "odd-words", "yes=true")[0] == 0
    assert names() == []


def test_remove_of_another_revision_than_expected_is_refused(mole, filled):
    code, _, err = mole("remove", filled, "sums", "expect='00000000'", "yes=true")
    assert code == 2
    assert "expected was '00000000'" in err
    assert names() == ["odd-words", "sums"]


def test_verify_returns_1_when_anything_is_wrong(mole, filled, tmp_path):
    assert mole("verify", filled) == (0, "2 sound, 0 wrong in lib (every byte checked)\n", "")
    weights = tmp_path / "lib" / "sums" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    code, out, _ = mole("verify", filled)
    assert code == 1
    assert "sums: " in out
    assert out.endswith("1 sound, 1 wrong in lib (every byte checked)\n")
    assert mole("verify", filled, "format=names")[:2] == (1, "sums\n")
    assert json.loads(mole("verify", filled, "--json")[1])["sound"] == ["odd-words"]
    assert mole("verify", filled, "quick=true")[0] == 0
    assert mole("verify", filled, "odd-words")[0] == 0
