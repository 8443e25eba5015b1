"""`mole library …`, the verbs that change experts and those about two libraries: output, what is left, exit code."""

import json

import pytest
import torch

from mole.adapters import Adapter, LoraWeights
from mole.cli.main import main
from mole.experts import BackboneRef, Expert, ExpertLibrary, describe, load_expert


def make_expert(seed, task="sums", **facts):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator)
    adapter = Adapter("lora", {"model.layers.0.mlp.up_proj": LoraWeights(A=A, B=B, alpha=4.0)}, targets=("up_proj",))
    return Expert(describe(adapter, BackboneRef("mole/tiny"), tasks=[task], **facts), adapter)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lib():
    """`lib` with `a` and `b`."""
    library = ExpertLibrary.open("lib")
    for seed, name in enumerate("ab"):
        library.add_expert(make_expert(seed), name)
    return library


@pytest.fixture
def mole(capsys):
    """Runs a command line; gives its exit code, what it printed, and what it printed to stderr."""

    def run(*words):
        code = main(["library", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def files(tmp_path):
    return {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def short(library, name):
    return library.card(name).revision[:8]


def test_update_puts_the_next_revision_on_top(mole, lib, tmp_path):
    make_expert(7).save(tmp_path / "next")
    first = short(lib, "a")
    code, out, _ = mole("update", "lib", "a", "next", "message=more steps")
    assert (code, out) == (0, f"updated a in lib, revision {short(lib, 'a')} (was {first})\n")
    assert lib.card("a").message == "more steps"
    assert lib.card("a").parent.startswith(first)
    assert mole("update", "lib", "a", "lib/a")[1] == f"unchanged: a is in lib at revision {short(lib, 'a')}\n"


def test_update_expects_where_the_new_one_comes_from(mole, lib, tmp_path):
    first = lib.card("a")
    expert = make_expert(7)
    expert.with_card(expert.card.next_after(first, "on")).save(tmp_path / "next")
    lib.edit_card("a", tags=["theirs"])
    code, out, err = mole("update", "lib", "a", "next")
    assert (code, out) == (2, "")
    assert f"expected was '{first.revision[:8]}'" in err
    assert lib.card("a").tags == ("theirs",)
    assert mole("update", "lib", "a", "next", f"expect='{short(lib, 'a')}'")[0] == 0
    assert lib.card("a").content == expert.card.content


def test_edit_changes_the_card_and_says_how(mole, lib):
    first = short(lib, "a")
    code, out, _ = mole("edit", "lib", "a", "set.tags=[en,glue]", "set.license=mit", "set.extra={round: 3}")
    assert (code, out) == (
        0,
        f"edited a in lib, revision {short(lib, 'a')} (was {first}): extra, license, tags\n",
    )
    card = lib.card("a")
    assert (card.tags, card.license, card.extra) == (("en", "glue"), "mit", {"round": 3})
    assert mole("edit", "lib", "a", "set.license=mit")[1].startswith("unchanged: a is in lib")
    assert mole("edit", "lib", "a", "unset=[license,tags]")[0] == 0
    assert (lib.card("a").license, lib.card("a").tags) == (None, ())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("a",), "nothing to change"),
        (("a", "set.tags=[x]", "unset=[tags]"), "tags is set and unset"),
        (("a", "set.tags=[Not A Tag]"), "must be a tag"),
        (("a", "set.tgas=[x]"), "tags"),
        (("c", "set.tags=[x]"), "unknown expert 'c'"),
        (("a", "set.tags=[x]", "expect='00000000'"), "expected was '00000000'"),
    ],
)
def test_edit_tells_what_cannot_be(mole, lib, tmp_path, words, told):
    before = files(tmp_path)
    code, out, err = mole("edit", "lib", *words)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err
    assert files(tmp_path) == before


def test_rename_history_and_restore(mole, lib):
    first = short(lib, "a")
    lib.edit_card("a", tags=["x"])
    second = short(lib, "a")
    assert mole("rename", "lib", "a", "c")[1].startswith(f"renamed c in lib, revision {second} (was a)")
    assert lib.names() == ["b", "c"]
    code, out, _ = mole("history", "lib", "c")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["revision", second, first]
    assert [row["revision"][:8] for row in json.loads(mole("history", "lib", "c", "--json")[1])] == [second, first]
    lib.rename_expert("c", "a")
    code, out, _ = mole("restore", "lib", f"a@{first}")
    assert (code, out) == (0, f"restored a in lib, revision {short(lib, 'a')} (says what {first} said)\n")
    assert lib.card("a").tags == ()
    assert [row["revision"][:8] for row in lib.history("a")][1:] == [second, first]


def test_rename_and_restore_tell_what_cannot_be(mole, lib):
    assert "taken" in mole("rename", "lib", "a", "b")[2]
    assert "how about 'a-b'" in mole("rename", "lib", "a", "A b")[2]
    assert "its name already" in mole("rename", "lib", "a", "a")[2]
    assert "which revision?" in mole("restore", "lib", "a")[2]
    assert "no revision" in mole("restore", "lib", "a@00000000")[2]
    assert lib.names() == ["a", "b"]


@pytest.mark.parametrize(
    "words",
    [
        ("update", "lib", "a", "next"),
        ("edit", "lib", "a", "set.tags=[x]"),
        ("rename", "lib", "a", "c"),
        ("restore", "lib", "a@{first}"),
        ("remove", "lib", "a"),
        ("push", "lib", "copy"),
        ("pull", "lib", "copy"),
        ("clone", "lib", "copy"),
        ("sync", "lib", "copy"),
        ("artefacts", "lib", "remove=true"),
        ("readme", "lib"),
    ],
    ids=lambda words: words[0],
)
def test_a_dry_run_writes_nothing(mole, lib, tmp_path, words):
    make_expert(7).save(tmp_path / "next")
    lib.artefact("a", "numbers", {}, lambda: [1])
    first = short(lib, "a")
    lib.edit_card("a", tags=["y"])
    before = files(tmp_path)
    code, out, err = mole(*(word.format(first=first) for word in words), "dry_run=true")
    assert (code, err) == (0, "")
    assert out
    assert files(tmp_path) == before
    assert not (tmp_path / "copy").exists()


def test_remove_says_until_when_the_files_stay(mole, lib):
    code, out, _ = mole("remove", "lib", "a", "b", "yes=true", "format=json")
    assert (code, [row["name"] for row in json.loads(out)]) == (0, ["a", "b"])
    assert lib.names() == []
    lib.add_expert(make_expert(0), "c")
    assert "its files stay in its .mole/history, until mole library gc" in mole("remove", "lib", "c", "yes=true")[1]


def test_push_copies_what_differs_and_again_nothing(mole, lib):
    revisions = [short(lib, name) for name in "ab"]
    expected = "".join(f"added {n} in copy, revision {r}\n" for n, r in zip("ab", revisions, strict=True))
    assert mole("push", "lib", "copy")[:2] == (0, f"{expected}2 copied, 0 equal, 0 skipped\n")
    assert mole("push", "lib", "copy")[1] == "0 copied, 2 equal, 0 skipped\n"
    lib.edit_card("a", tags=["x"])
    rows = json.loads(mole("push", "lib", "copy", "format=json")[1])
    assert [(row["name"], row["action"]) for row in rows] == [("a", "edit"), ("b", "equal")]
    assert ExpertLibrary.open("copy").cards() == lib.cards()


def test_pull_chooses_by_name_and_condition(mole, lib):
    assert mole("pull", "lib", "copy", "names=[b]")[0] == 0
    assert ExpertLibrary.open("copy").names() == ["b"]
    assert mole("pull", "lib", "copy", "where.tasks=sums", "where.names=a*")[0] == 0
    assert ExpertLibrary.open("copy").names() == ["a", "b"]
    assert "no expert has tasks 'words'" in mole("pull", "lib", "copy", "where.tasks=words")[2]


def test_a_conflict_of_a_push_says_what_to_do(mole, lib):
    mole("push", "lib", "copy")
    copy = ExpertLibrary.open("copy")
    lib.update_expert("a", make_expert(7))
    copy.update_expert("a", make_expert(8))
    code, out, err = mole("push", "lib", "copy")
    assert (code, out) == (2, "")
    assert "nothing was copied: a (was changed on both sides" in err
    assert "on_conflict=skip" in err
    assert "skipped a" in mole("push", "lib", "copy", "on_conflict=skip")[1]
    assert mole("push", "lib", "copy", "on_conflict=replace")[1].startswith("replaced a in copy")
    assert copy.card("a") == lib.card("a")


def test_clone_wants_an_empty_target(mole, lib):
    first = lib.card("a")
    lib.edit_card("a", tags=["x"])
    assert mole("clone", "lib", "copy", "history=true")[1].endswith("2 copied, 0 equal, 0 skipped\n")
    assert ExpertLibrary.open("copy").card("a", first.revision) == first
    code, _, err = mole("clone", "lib", "copy")
    assert code == 2
    assert "copy has 2 experts; clone into a new or empty library" in err


def test_sync_goes_both_ways_and_returns_1_for_conflicts(mole, lib):
    copy = ExpertLibrary.open("copy")
    copy.add_expert(make_expert(5), "c")
    code, out, _ = mole("sync", "lib", "copy")
    assert code == 0
    assert out.endswith("3 added, 0 updated, 0 edited, 0 removed, 0 gone on one side, 0 equal, 0 conflicts\n")
    assert "added c in lib: new in copy" in out
    assert lib.cards() == copy.cards()
    copy.update_expert("a", make_expert(7))
    lib.update_expert("a", make_expert(8))
    copy.remove_expert("c")
    code, out, _ = mole("sync", "lib", "copy")
    assert code == 1
    assert "conflict a: changed on both sides" in out
    assert "gone c: gone from copy; delete=true" in out
    code, out, _ = mole("sync", "lib", "copy", "delete=true", "format=json")
    assert code == 1
    assert {row["name"]: row["what"] for row in json.loads(out)} == {"a": "conflict", "b": "equal", "c": "remove"}
    assert lib.names() == ["a", "b"]


def test_diff_tells_kinds_and_fields(mole, lib):
    mole("push", "lib", "copy")
    assert mole("diff", "lib", "copy") == (0, "lib and copy have the same experts\n", "")
    lib.edit_card("a", tags=["x"])
    ExpertLibrary.open("copy").update_expert("b", make_expert(7, license="mit"))
    lib.add_expert(make_expert(5), "c")
    assert mole("diff", "lib", "copy")[1].splitlines() == [
        "a: the same content, another card: tags",
        "b: other content: license",
        "c: only in lib",
    ]
    assert mole("diff", "lib", "copy", "format=names")[1] == "a\nb\nc\n"


def test_artefacts_are_listed_shown_and_removed(mole, lib):
    lib.artefact("a", "numbers", {"k": 2}, lambda: [1])
    lib.artefact(["a", "b"], "table", {}, lambda: [[1]])
    code, out, _ = mole("artefacts", "lib")
    assert code == 0
    assert out.endswith("2 artefacts in lib\n")
    (row,) = json.loads(mole("artefacts", "lib", "a", "kind=numbers", "--json")[1])
    assert (row["experts"], row["kind"], row["config"]) == (["a"], "numbers", {"k": 2})
    assert "artefact numbers" in mole("show", "lib", "a")[1]
    assert mole("artefacts", "lib", "kind=numbers", "remove=true")[1].endswith("1 artefacts removed from lib\n")
    assert [row.card.kind for row in lib.artefacts()] == ["table"]


def test_show_of_a_sound_expert_does_not_mind_a_damaged_one_beside_it(mole, lib, tmp_path):
    (tmp_path / "lib" / "b" / "expert.json").write_text("{}")
    assert mole("show", "lib", "a")[0] == 0
    code, _, err = mole("push", "lib", "copy")
    assert code == 2
    assert "lib/b" in err
    assert mole("push", "lib", "copy", "names=[a]")[0] == 0


def test_gc_only_says_what_would_go_until_it_is_told(mole, lib, tmp_path):
    lib.edit_card("a", tags=["x"])
    before = files(tmp_path)
    code, out, _ = mole("gc", "lib", "older_than=0s", "keep=0")
    assert code == 0
    assert "dry_run=false removes it" in out
    assert files(tmp_path) == before
    assert len(json.loads(mole("gc", "lib", "older_than=0s", "keep=0", "format=json")[1])) == 1
    assert mole("gc", "lib", "older_than=0s", "keep=0", "dry_run=false")[1].startswith("removed ")
    assert mole("gc", "lib", "older_than=0s", "keep=0")[1] == "0 things, 0 B, in lib\n"
    assert "write 30m, 12h, 7d or 2w" in mole("gc", "lib", "older_than=soon")[2]


def test_readme_keeps_what_its_owner_wrote(mole, lib, tmp_path):
    page = tmp_path / "lib" / "README.md"
    assert mole("readme", "lib") == (0, "README.md of lib is up to date\n", "")
    page.write_text(page.read_text().replace("# A library of experts", "# Mine\n\nWith love."))
    lib.rename_expert("a", "z")
    assert mole("readme", "lib")[0] == 0
    text = page.read_text()
    assert "With love." in text
    assert "| z |" in text
    assert "| a |" not in text
    assert mole("readme", "lib", "dry_run=true")[1] == text
    assert mole("verify", "lib")[0] == 0
    assert load_expert("lib/z").card == lib.card("z")


def test_list_takes_conditions_on_scores_and_dates(mole, lib):
    lib.add_score("a", {"metric": "accuracy", "value": 0.9, "task": "sums"})
    assert mole("list", "lib", "format=names", "where.min_score=accuracy:0.8")[1] == "a\n"
    assert mole("list", "lib", "format=names", "where.min_score=accuracy:sums:0.8")[1] == "a\n"
    assert mole("list", "lib", "format=names", "where.created_after=2020-01-31")[1] == "a\nb\n"
    assert "no expert has created_after" in mole("list", "lib", "where.created_after=2099-01-01")[2]
