"""`mole library …` where an expert is damaged, renamed or asked for at a revision: nothing else is in its way."""

import json

import pytest
from test_library_verbs import _in_a_folder_of_its_own, lib, make_expert, mole, short  # noqa: F401  (fixtures)

from mole.experts import ExpertLibrary

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def damaged(lib, tmp_path):  # noqa: F811
    (tmp_path / "lib" / "a" / "expert.json").write_text("garbage")
    return lib


def test_a_damaged_expert_can_be_removed(mole, damaged):  # noqa: F811
    code, out, _ = mole("remove", "lib", "a", "yes=true")
    assert code == 0
    assert out.startswith("removed a from lib, damaged; ")
    assert damaged.names() == ["b"]
    assert mole("remove", "lib", "b", "expect=00000000", "yes=true")[0] == 2


def test_a_damaged_expert_is_at_no_revision_that_could_be_expected(mole, damaged):  # noqa: F811
    code, _, err = mole("remove", "lib", "a", "expect=abcdef12", "yes=true")
    assert code == 2
    assert "is damaged, expected was abcdef12; leave out expect" in err


def test_a_damaged_expert_can_be_replaced_by_update_and_push(mole, damaged, tmp_path):  # noqa: F811
    new = make_expert(7)
    new.save(tmp_path / "next")
    code, out, _ = mole("update", "lib", "a", "next")
    assert (code, out) == (0, f"updated a in lib, revision {new.revision[:8]} (was damaged)\n")
    assert damaged.get_expert("a").adapter
    other = ExpertLibrary.open("other")
    for seed, name in enumerate("ab"):
        other.add_expert(make_expert(seed), name)
    (tmp_path / "lib" / "a" / "expert.json").write_text("garbage")
    code, _, err = mole("push", "other", "lib")
    assert code == 2
    assert "a (is damaged there)" in err
    assert mole("push", "other", "lib", "on_conflict=skip")[1].startswith("skipped a")
    assert mole("push", "other", "lib", "on_conflict=replace")[1].startswith("replaced a in lib")
    assert mole("verify", "lib")[0] == 0


def test_a_damaged_expert_of_the_source_does_not_hold_up_the_others(mole, damaged):  # noqa: F811
    for words in ((), ("names=[a]",)):
        code, _, err = mole("push", "lib", "other", *words)
        assert code == 2
        assert "copy the others with names=[…]" in err
        assert "mole library remove lib a" in err
    assert mole("push", "lib", "other", "names=[b]")[1].startswith("added b in other")
    code, out, err = mole("clone", "lib", "all")
    assert (code, out[:7]) == (0, "added b")
    assert "left out, as damaged: lib/a" in err


@pytest.mark.parametrize(
    "words", [("similar", "lib"), ("map", "lib"), ("cluster", "lib", "clusters=2"), ("diff", "lib", "lib")]
)
def test_reading_passes_a_damaged_expert_by(mole, damaged, words):  # noqa: F811
    damaged.add_expert(make_expert(3), "c")
    code, _, err = mole(*words)
    assert code == 0
    assert "left out, as damaged: lib/a" in err
    assert mole("similar", "lib", "experts=[a,b]")[0] == 2


@pytest.mark.parametrize("words", [("rename", "lib", "a", "c"), ("rename", "lib", "b", "a")])
def test_what_a_damaged_expert_forbids_names_the_way_out(mole, damaged, words):  # noqa: F811
    code, _, err = mole(*words)
    assert code == 2
    assert "mole library remove lib a" in err


def test_damaged_weights_are_told_with_the_way_out_and_put_right(mole, lib, tmp_path):  # noqa: F811
    lib.get_expert("a").save(tmp_path / "sound")
    file = tmp_path / "lib" / "a" / WEIGHTS
    sound = file.read_bytes()
    for words, told in [
        (("push", "from", "lib", "on_conflict=replace"), "repaired a in lib"),
        (("add", "lib", "sound", "name=a"), "repaired a in lib"),
        (("update", "lib", "a", "sound"), "repaired a in lib"),
    ]:
        if "from" in words and not (tmp_path / "from").exists():
            mole("clone", "lib", "from")
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        code, out, _ = mole("verify", "lib")
        assert code == 1
        assert "on_conflict=replace" in out
        assert mole(*words)[1].startswith(told)
        assert file.read_bytes() == sound
        assert mole("verify", "lib")[0] == 0
    assert mole("push", "from", "lib", "on_conflict=replace")[1] == "0 copied, 2 equal, 0 skipped\n"
    assert not [one for one in (tmp_path / "lib" / ".mole" / "history").glob("a/*") if "damaged" not in one.name]


def test_what_was_before_a_rename_is_found_under_the_new_name(mole, lib, tmp_path):  # noqa: F811
    first = short(lib, "a")
    make_expert(7).save(tmp_path / "next")
    mole("update", "lib", "a", "next")
    second = short(lib, "a")
    mole("rename", "lib", "a", "new")
    assert mole("show", "lib", f"new@{first}", "format=json")[0] == 0
    assert mole("get", "lib", f"new@{first}", "got")[1] == f"new, revision {first}, is in got\n"
    code, out, _ = mole("restore", "lib", f"new@{first}")
    assert code == 0
    assert f"says what {first} said" in out
    assert [row["revision"][:8] for row in lib.history("new")][1:] == [second, first]
    assert mole("show", "lib", "b@" + first)[0] == 2


def test_history_show_and_get_take_a_revision_behind_the_name(mole, lib, tmp_path):  # noqa: F811
    first = short(lib, "a")
    mole("edit", "lib", "a", "set.tags=[x]")
    assert json.loads(mole("show", "lib", f"a@{first}", "format=json")[1])["tags"] == []
    assert len(json.loads(mole("history", "lib", f"a@{first}", "format=json")[1])) == 1
    assert mole("get", "lib", f"a@{first}", "got", "format=names")[1] == "a\n"
    code, _, err = mole("show", "lib", f"a@{first}", f"revision={first}")
    assert code == 2
    assert "give one of them" in err


def test_add_get_and_import_print_json(mole, lib, tmp_path):  # noqa: F811
    make_expert(7).save(tmp_path / "next")
    (row,) = json.loads(mole("add", "lib", "next", "name=c", "format=json")[1])
    assert row == {
        "name": "c",
        "action": "add",
        "revision": lib.card("c").revision,
        "library": "lib",
        "dry_run": False,
    }
    (row,) = json.loads(mole("get", "lib", "c", "got", "format=json")[1])
    assert (row["action"], row["dest"]) == ("get", "got")
    mole("export", "lib", "c", "peft")
    assert json.loads(mole("import", "peft", "lib", "name=d", "format=json")[1])[0]["action"] == "import"


@pytest.mark.parametrize("verb", ["list", "push", "show"])
@pytest.mark.parametrize("address", ["hf://alice", "hf://datasets/a/b"])
def test_a_wrong_address_is_told_in_plain_words(mole, lib, verb, address):  # noqa: F811
    words = {"list": (address,), "push": ("lib", address), "show": (address, "a")}[verb]
    code, _, err = mole(verb, *words)
    assert code == 2
    assert "write hf://user/" in err
    assert "validation error" not in err


def test_export_and_readme_print_json_and_a_list_of_names_is_one(mole, lib, tmp_path):  # noqa: F811
    rows = json.loads(mole("export", "lib", "[a,b]", "map.json", "format=adapter-weights", "json=true")[1])
    assert [(row["name"], row["action"], row["dest"]) for row in rows] == [
        ("a", "export", "map.json"),
        ("b", "export", "map.json"),
    ]
    assert list(json.loads((tmp_path / "map.json").read_text())) == ["a", "b"]
    assert mole("export", "lib", "[a,b]", "peft")[0] == 2
    (row,) = json.loads(mole("readme", "lib", "format=json")[1])
    assert (row["action"], row["name"]) == ("readme", "README.md")
