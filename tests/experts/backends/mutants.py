"""Breaks the code on purpose, one place after the other, and wants a named test to fail each time. Run by hand:

    python tests/experts/backends/mutants.py             every mutant; exit code 1 if one lives
    python tests/experts/backends/mutants.py lock etag   those whose names hold one of the words

Known blind spot: a dropped fsync. Without a machine that loses its power it cannot be seen.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401  (see tried)

ROOT = Path(__file__).parents[3]
BACKENDS = "mole/experts/backends"
CONTRACT, LOCAL, BLOB, FAULTS = (
    f"tests/experts/backends/{name}.py" for name in ("test_contract", "test_local", "test_blob", "test_blob_faults")
)


class Mutant(NamedTuple):
    """In `file`, `old` (which stands there once) becomes `new`; then `test` (file, words of -k) fails."""

    name: str
    file: str
    old: str
    new: str
    test: tuple[str, str]


MUTANTS = [
    Mutant(
        "local: no lock around the swap",
        f"{BACKENDS}/local.py",
        "with self._folder.locked():\n                    return",
        "if True:\n                    return",
        (LOCAL, "swapped_in_under_one_lock"),
    ),
    Mutant(
        "local: a listing without the lock",
        f"{BACKENDS}/local.py",
        "with self._folder.reading():  # or an expert",
        "if True:  # or an expert",
        (LOCAL, "swapped_in_under_one_lock"),
    ),
    Mutant(
        "local: absence is believed at once",
        f"{BACKENDS}/local.py",
        "if data is None:\n            with self._folder.reading():",
        "if False:\n            with self._folder.reading():",
        (LOCAL, "reader_in_the_middle_of_a_swap"),
    ),
    Mutant(
        "local: the last copy of a reader without the lock",
        f"{BACKENDS}/local.py",
        "with self._folder.reading():  # or a busy",
        "if True:  # or a busy",
        (LOCAL, "not_starved"),
    ),
    Mutant(
        "local: no repair",
        f"{BACKENDS}/local_folder.py",
        'for old in sorted(self.aside.glob("old-*")):',
        "for old in ():",
        (LOCAL, "a_death_before_any_call and replace"),
    ),
    Mutant(
        "local: repair the wrong way round",
        f"{BACKENDS}/local_folder.py",
        "if (self.root / name).exists():",
        "if not (self.root / name).exists():",
        (LOCAL, "a_death_before_any_call and replace"),
    ),
    Mutant(
        "local: a fork keeps the lock of its parent",
        f"{BACKENDS}/local_folder.py",
        "if process not in self._locks:",
        "if False:",
        (LOCAL, "death or processes"),
    ),
    Mutant(
        "local: remove ignores what it expects",
        f"{BACKENDS}/local.py",
        "self._must_be(change.name, there, change.expect)",
        "card is None or self._must_be(change.name, there, change.expect)",
        (CONTRACT, "expects_another_version and local"),
    ),
    Mutant(
        "local: an old revision is thrown away",
        f"{BACKENDS}/local_folder.py",
        "os.rename(folder, place)",
        "shutil.rmtree(folder)",
        (CONTRACT, "old_revisions_stay and local"),
    ),
    Mutant(
        "local: a listing reads links",
        f"{BACKENDS}/local_folder.py",
        " and not entry.is_symlink()",
        "",
        (LOCAL, "linked_folder"),
    ),
    Mutant(
        "local: tokens know the card's size only",
        f"{BACKENDS}/local_folder.py",
        'f"{facts.st_ino}-{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ctime_ns}"',
        'f"{facts.st_dev}"',
        (CONTRACT, "token_of_a_listing and local"),
    ),
    Mutant(
        "local: collecting keeps nothing",
        f"{BACKENDS}/local_garbage.py",
        "for _, path in revisions[:keep]",
        "for _, path in revisions[:0]",
        (LOCAL, "beyond_what_is_kept"),
    ),
    Mutant(
        "local: collecting takes what is young",
        f"{BACKENDS}/local_garbage.py",
        " and moved / 1e9 <= before",
        "",
        (LOCAL, "lets_be_what_is_young"),
    ),
    Mutant(
        "local: collecting takes the folder of a living writer",
        f"{BACKENDS}/local_garbage.py",
        "max(older_than, LEAST_AGE)",
        "older_than",
        (LOCAL, "not_that_of_a_living_one"),
    ),
    Mutant(
        "local: collecting deletes in place",
        f"{BACKENDS}/local_garbage.py",
        "os.rename(path, dead[-1])",
        "dead[-1] = path",
        (LOCAL, "no_half_revision"),
    ),
    Mutant(
        "folder: sizes are checked, digests are not",
        "mole/experts/folder.py",
        'if {"size": size, "sha256": digest.hexdigest()} != wanted:',
        'if size != wanted["size"]:',
        (CONTRACT, "not_what_its_card_says and changed and (local or memory)"),
    ),
    Mutant(
        "batch: a name may stand twice",
        f"{BACKENDS}/changes.py",
        "if change.name in seen:",
        "if False:",
        (CONTRACT, "names_an_expert_once and (local or memory)"),
    ),
    Mutant(
        "blob: the card is written unconditionally",
        f"{BACKENDS}/blob.py",
        "written = self._store.replace(key, data, version)",
        "written = str(self._store.put(key, data, len(data)) or self._store.head(key).version)",
        (BLOB, "seen_the_same_state and memory"),
    ),
    Mutant(
        "blob: the store is not probed",
        f"{BACKENDS}/blob_store.py",
        "if self._obeys.is_set():",
        "if True:",
        (BLOB, "ignores_conditions"),
    ),
    Mutant(
        "blob: the card before its files",
        f"{BACKENDS}/blob.py",
        "if change.folder is not None and not is_done:",
        "if False:",
        (BLOB, "a_death_at_any_write and (add or update)"),
    ),
    Mutant(
        "blob: keys without the digest",
        f"{BACKENDS}/blob_store.py",
        "files/{name}/{wanted['sha256']}/{file}",
        "files/{name}/{file}",
        (CONTRACT, "old_revisions_stay and memory"),
    ),
    Mutant(
        "blob: a tombstone is listed",
        f"{BACKENDS}/blob.py",
        "row.size != len(TOMBSTONE) and ",
        "",
        (BLOB, "tombstone_that_counts"),
    ),
    Mutant(
        "blob: a tombstone blocks its name",
        f"{BACKENDS}/blob.py",
        "None if found[0] == TOMBSTONE else found[0]",
        "found[0]",
        (CONTRACT, "removed_name_is_free and memory"),
    ),
    Mutant(
        "blob: a delete after the tombstone",
        f"{BACKENDS}/blob.py",
        'return "" if card is None else written',
        'return str(self._store.delete(key) or "") if card is None else written',
        (BLOB, "removal_deletes_nothing"),
    ),
    Mutant(
        "blob: remove ignores what it expects",
        f"{BACKENDS}/blob.py",
        "if (None if there is None else version) == change.expect:",
        "if card is None or (None if there is None else version) == change.expect:",
        (CONTRACT, "expects_another_version and memory"),
    ),
    Mutant(
        "blob: the replaced card is not kept",
        f"{BACKENDS}/blob.py",
        "self._store.put(past_key(change.name, revision), there, len(there))",
        "pass",
        (CONTRACT, "old_revisions_stay and memory"),
    ),
    Mutant(
        "blob: the etag as it comes",
        f"{BACKENDS}/blob_store.py",
        'return tag if tag.startswith("W/") else',
        "return tag if tag else",
        (BLOB, "damaged_card_is_one_error and azure"),
    ),
    Mutant(
        "blob: a lost reply is not recognised",
        f"{BACKENDS}/blob.py",
        "if (there is None and card is None) or (card is not None and revision == card.revision):",
        "if False:",
        (FAULTS, "gets_over_faults and s3 and lose"),
    ),
    Mutant(
        "blob: the probe takes its own write for another's",
        f"{BACKENDS}/blob_store.py",
        "if found is None or found[0] != data:",
        "if True:",
        (FAULTS, "gets_over_faults and s3 and lose"),
    ),
    Mutant(
        "blob: sizes are checked, digests are not",
        f"{BACKENDS}/blob.py",
        'if digest.hexdigest() != wanted["sha256"]:',
        "if False:",
        (BLOB, "fetch_of_damage and changed and memory"),
    ),
    Mutant(
        "blob: a batch does not look at all versions first",
        f"{BACKENDS}/blob.py",
        "done = [self._must_be(one, *self._current(one.name), card) for one, card in zip(changes, cards, strict=True)]",
        "done = [False for _ in changes]",
        (CONTRACT, "makes_none and memory and expect"),
    ),
    Mutant(
        "blob: collecting does not ask for the age again",
        f"{BACKENDS}/blob_garbage.py",
        "if again is None or again.modified > before:",
        "if again is None:",
        (BLOB, "published_while_it_is_being_collected"),
    ),
    Mutant(
        "blob: files that are there are not put again",
        f"{BACKENDS}/blob.py",
        "if not only_missing or (row",
        "if (row",
        (BLOB, "published_while_it_is_being_collected"),
    ),
    Mutant(
        "blob: a publisher does not look after its files",
        f"{BACKENDS}/blob.py",
        "self._put_files(change.name, change.folder, card, only_missing=True)",
        "pass",
        (BLOB, "collected_while_it_is_being_published"),
    ),
    Mutant(
        "blob: collecting goes by this machine's clock",
        f"{BACKENDS}/blob_garbage.py",
        "now = datetime.now(UTC) if dry_run else store.now()",
        "now = datetime.now(UTC)",
        (BLOB, "clock_of_the_store"),
    ),
    Mutant(
        "blob: files of damaged cards are collected",
        f"{BACKENDS}/blob_garbage.py",
        "self._names.add(name)",
        "pass",
        (BLOB, "cannot_be_read_stay"),
    ),
    Mutant(
        "blob: errors tell the signed address",
        f"{BACKENDS}/blob_store.py",
        '_QUERY.sub("?…", ',
        "str(",
        (BLOB, "told_of_a_clients_error"),
    ),
]


def main(mutants: Sequence[Mutant], words: Sequence[str]) -> int:
    """Tries those whose names hold one of the words, or all; prints a line for each. The number that live."""
    chosen = [one for one in mutants if not words or any(word in one.name for word in words)]
    alive = 0
    with tempfile.TemporaryDirectory(prefix="mole-mutants-") as place:
        copy = Path(place)
        for part in ("mole", "conf", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for one in chosen:
            verdict = tried(one, copy)
            alive += verdict != "caught"
            print(f"{verdict:8} {one.name}   ({one.test[0].rpartition('/')[2]} -k '{one.test[1]}')", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} caught")
    return alive


def tried(one: Mutant, copy: Path) -> str:
    """caught, or LIVES, or what kept it from being tried."""
    path = copy / one.file
    text = path.read_text(encoding="utf-8")
    if text.count(one.old) != 1:
        return f"IS THERE {text.count(one.old)} TIMES"
    path.write_text(text.replace(one.old, one.new), encoding="utf-8")
    child = os.fork()  # what is imported already, torch and pytest, need not be imported each time
    if child == 0:
        _test(one, copy)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    path.write_text(text, encoding="utf-8")
    skipped = " skipped" in (copy / "log").read_text(encoding="utf-8").splitlines()[-1]
    verdicts = {0: "SKIPPED" if skipped else "LIVES", 1: "caught", -signal.SIGALRM: "caught"}
    return verdicts.get(code, f"NOT TRIED ({code})")


def _test(one: Mutant, copy: Path) -> None:
    """Runs the test on the copy, and ends the process."""
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    log = os.open(copy / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.alarm(240)  # a lock that is never given back is a failure, too
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", one.test[0], "-k", one.test[1]])
    sys.stdout.flush()
    os._exit(int(code))


if __name__ == "__main__":
    sys.exit(bool(main(MUTANTS, sys.argv[1:])))
