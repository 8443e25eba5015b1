"""The library over other places than a folder: the same calls, the same cards, and nothing imported too early."""

import subprocess
import sys
import uuid

import pytest

from mole.experts import Conflict, ExpertLibrary
from mole.experts.copying import clone
from mole.experts.syncing import sync


@pytest.fixture
def memory():
    return ExpertLibrary.open(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def filled(library, make):
    for seed, name in enumerate(("a", "b", "c")):
        library.add_expert(make(seed), name)
    return library


def test_the_changes_of_a_library_work_in_a_store_of_objects(memory, make):
    first = memory.add_expert(make(0), "a")
    second = memory.update_expert("a", make(1))
    third = memory.edit_card("a", tags=["x"])
    assert [row["revision"] for row in memory.history("a")] == [c.revision for c in (third, second, first)]
    assert memory.get_expert("a", first.revision[:8]).card == first
    assert memory.restore_expert("a", first.revision).content == first.content
    memory.rename_expert("a", "b")
    with memory.batch() as batch:
        batch.add_expert(make(5), "c")
        batch.remove_expert("b")
    assert memory.names() == ["c"]
    with pytest.raises(Conflict, match="'c' is taken"):
        memory.add_expert(make(6), "c")
    memory.artefact("c", "numbers", {}, lambda: [1])
    memory.remove_expert("c")
    assert memory.artefacts() == []


def test_copies_go_through_a_store_and_back_the_same(filled, memory, tmp_path, make):
    filled.artefact("b", "numbers", {}, lambda: {"x": [1]})
    first = filled.card("a")
    filled.update_expert("a", make(7))
    clone(filled, memory, history=True)
    back = ExpertLibrary.open(str(tmp_path / "back"))
    clone(memory, back, history=True)
    assert back.cards() == memory.cards() == filled.cards()
    assert back.card("a", first.revision) == memory.card("a", first.revision) == first
    assert back.artefact("b", "numbers", {}) == {"x": [1]}
    assert back["a"].adapter.tensors().keys() == filled["a"].adapter.tensors().keys()
    assert list(back.verify()) == list(memory.verify()) == ["a", "b", "c"]


def test_sync_with_a_store_remembers_in_the_folder(filled, memory):
    assert {step.what for step in sync(filled, memory)} == {"copy"}
    memory.edit_card("a", tags=["x"])
    filled.remove_expert("b")
    assert {step.name: step.what for step in sync(memory, filled, delete=True)} == {
        "a": "copy",
        "b": "remove",
        "c": "equal",
    }
    assert memory.cards() == filled.cards()


def test_nothing_heavy_is_imported_before_it_is_needed(filled):
    """The listing of a folder needs neither torch nor the clients of other places."""
    code = (
        "import sys; from mole.cli.main import main; import mole.experts\n"
        f"assert main(['library', 'list', {filled.url!r}]) == 0\n"
        f"assert main(['library', 'edit', {filled.url!r}, 'a', 'set.tags=[x]']) == 0\n"
        f"assert main(['library', 'push', {filled.url!r}, {filled.url + '-copy'!r}]) == 0\n"
        "heavy = sorted({'torch', 'huggingface_hub', 'obstore', 'transformers', 'peft'} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
