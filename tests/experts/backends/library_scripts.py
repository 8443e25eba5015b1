"""Run as a program, without torch: what needs processes that die, or many of them. Prints one JSON value.

crash <old> <new> <third> <root> <operation>    one line for each point at which a process was killed
rename <folder> <root>                          the same, of a batch that adds one name and removes another
writers <root> <shared name, or "-"> <folder>…  a process for each folder, all publishing at once
blob <server> <bucket> <number> <folder>        one of several processes; waits for a line before it publishes
"""

import json
import multiprocessing
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from mole.experts import Conflict, Damaged, LocalBackend, UnknownExpert
from mole.experts.backends import BlobBackend, Change
from mole.experts.folder import read_card

CALLS = ("open", "rename", "replace", "unlink", "rmdir", "mkdir", "fsync")
DEAD = 77


@contextmanager
def killed_at(last: int):
    """The process ends, with no clean-up at all, right before its call number `last` into the file system."""
    count = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == last:
                os._exit(DEAD)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    yield


def in_child(function) -> int:
    """Runs `function` in a child process and returns its exit code."""
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def crash(old: str, new: str, third: str, root: str, operation: str) -> list[dict]:
    found = []
    for last in range(1, 200):
        shutil.rmtree(root, ignore_errors=True)
        backend = LocalBackend(root)
        if operation != "add":
            backend.publish("mrpc", Path(old))

        def work(backend=backend, last=last):
            version = None if operation == "add" else backend.card("mrpc")[1]
            with killed_at(last):
                if operation == "remove":
                    backend.remove("mrpc", version)
                else:
                    backend.publish("mrpc", Path(new), version)

        code = in_child(work)
        found.append({"code": code, **_after(root, {old: "old", new: "new"}, third)})
        if code == 0:
            return found
    raise AssertionError("no end")


def rename(folder: str, root: str) -> list[dict]:
    found = []
    for last in range(1, 200):
        shutil.rmtree(root, ignore_errors=True)
        backend = LocalBackend(root)
        version = backend.publish("mrpc", Path(folder))
        changes = [Change("paraphrase", Path(folder), None), Change("mrpc", None, version)]

        def work(backend=backend, changes=changes, last=last):
            with killed_at(last):
                backend.apply(changes, "rename")

        code = in_child(work)
        backend = LocalBackend(root)
        names = list(backend.cards())
        whole = all(backend.verify(name) == read_card(folder) for name in names)
        backend.apply(changes, "rename, again")
        found.append({"names": names, "whole": whole, "again": list(backend.cards())})
        if code == 0:
            return found
    raise AssertionError("no end")


def _after(root: str, states: dict[str, str], third: str) -> dict:
    """What a reader sees, and whether the next writer can write and the one after can read."""
    backend = LocalBackend(root)
    revisions = {read_card(folder).revision: state for folder, state in states.items()}
    listed, state, version = [], "absent", None
    if backend.exists():
        listed = list(backend.cards())
        try:
            card, version = backend.card("mrpc")
            dest = Path(root).with_name("fetched")
            shutil.rmtree(dest, ignore_errors=True)
            dest.mkdir()
            backend.fetch("mrpc", dest)
            state = revisions[card.revision]
        except UnknownExpert:
            pass
        except Damaged as error:
            state = f"damaged: {error}"
    backend.publish("mrpc", Path(third), version)
    written = backend.card("mrpc")[0].revision == read_card(third).revision
    strays = [entry for entry in os.listdir(Path(root) / ".mole") if entry.startswith("old-")]
    return {"state": state, "listed": listed == ([] if state == "absent" else ["mrpc"]), "next": written, "old": strays}


def writers(root: str, shared: str, *folders: str) -> list[str]:
    processes = multiprocessing.get_context("fork")
    barrier, results = processes.Barrier(len(folders)), processes.Queue()

    def work(number: int, folder: str) -> None:
        backend = LocalBackend(root)
        barrier.wait()
        try:
            backend.publish(f"expert-{number}" if shared == "-" else shared, Path(folder))
            results.put(read_card(folder).revision)
        except Conflict:
            results.put("conflict")

    children = [processes.Process(target=work, args=pair) for pair in enumerate(folders)]
    for child in children:
        child.start()
    found = [results.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    return found


def blob(server: str, bucket: str, number: str, folder: str) -> list[str]:
    """Publishes under a name of its own, then under the name of all. Says what became of it."""
    from obstore.store import S3Store

    keys = {"access_key_id": "k", "secret_access_key": "s", "region": "us-east-1"}
    store = S3Store(bucket, endpoint=server, client_options={"allow_http": True}, **keys)
    backend = BlobBackend(store, f"s3://{bucket}/lib", "lib")
    print("ready", flush=True)
    sys.stdin.readline()
    outcomes = []
    for name in (f"expert-{number}", "mrpc"):
        try:
            backend.publish(name, Path(folder))
            outcomes.append(read_card(folder).revision)
        except Conflict as error:
            outcomes.append(f"conflict with {error.revision}")
    return outcomes


if __name__ == "__main__":
    assert "torch" not in sys.modules
    print(json.dumps({"crash": crash, "rename": rename, "writers": writers, "blob": blob}[sys.argv[1]](*sys.argv[2:])))
