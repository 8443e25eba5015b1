"""A token, and the signature of a link, stand in no error, log, card, page or commit, whatever goes wrong."""

import logging
import pickle
import traceback
from dataclasses import replace
from functools import partial

import pytest
from hub_server import Fault
from hub_server.fixtures import ALICE, BRIEF

from mole.experts import LibraryError
from mole.experts.backends import Change
from mole.experts.backends.hub import HubBackend
from mole.experts.backends.hub_requests import scrub_text


@pytest.fixture
def folder(make, tmp_path):
    for seed in range(2):
        make(seed).save(tmp_path / f"expert-{seed}")
    return tmp_path / "expert-0"


@pytest.fixture
def repo(hub, repo_id):
    return hub.create(repo_id)


def told(error):
    """All that can be seen of an error and of what stands behind it, the arguments of every frame left out."""
    texts = ["".join(traceback.format_exception(error))]
    while error is not None:
        texts += [str(error), repr(error), repr(vars(error)), repr(getattr(error, "__notes__", []))]
        texts.append(repr(pickle.dumps(error)))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


FAULTS = [
    *({"status": status} for status in (401, 416)),
    {"status": 403, "headers": {"X-Error-Message": f"Bearer {ALICE} may not; see http://x.test/y?sig=SIGNED"}},
    {"status": 500, "headers": {"X-Error-Message": f"token {ALICE}"}, "body": ALICE.encode()},
    {"status": 302, "headers": {"Location": "http://127.0.0.1:1/x?sig=SIGNED"}},
    {"status": 200, "body": ALICE.encode()},
    {"lose_reply": True},
    {"cut_after": 3},
]
READS = ["/revision/", "/tree/", "/paths-info/", "/resolve/", "GET /models"]
WRITES = ["/preupload/", "/lfs/objects", "PUT /models", "/commit/"]


@pytest.mark.parametrize("place", [*READS, *WRITES])
def test_no_error_and_no_log_holds_a_secret(hub_backend, hub, repo, folder, tmp_path, caplog, capfd, place):
    hub_backend.publish("there", folder)
    backend = HubBackend(hub_backend.url.removeprefix("hf://"), patience=replace(BRIEF, total=0.05))
    loggers = ("", "huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2")
    for name in loggers:
        caplog.set_level(logging.DEBUG, logger=name)
    seen = []
    for fault in FAULTS:
        hub.faults[:] = [Fault(place, times=10_000, **fault)]
        dest = tmp_path / f"dest-{FAULTS.index(fault)}"
        dest.mkdir()
        for action in (
            partial(backend.fetch, "there", dest),
            partial(backend.publish, "new", tmp_path / "expert-1"),
            backend.cards,
        ):
            try:
                action()
            except LibraryError as error:
                seen.append(told(error))
    hub.faults.clear()
    assert seen
    output = capfd.readouterr()
    everything = "\n".join([*seen, caplog.text, output.out, output.err])
    assert len(caplog.records) > 50
    for secret in (ALICE, "SIGNED", "sig=", "Bearer hf_"):
        assert secret not in everything


def test_no_commit_and_no_file_holds_the_token(hub_backend, hub, repo, folder):
    hub_backend.apply([Change("mrpc", folder, None)], f"with {ALICE} and https://x.test/a?sig=SIGNED in it")
    assert ALICE not in repo.log()[0].title
    assert "SIGNED" not in repo.log()[0].title
    rows = repo.tree(repo.resolve("main")).values()
    assert ALICE.encode() not in b"".join(repo.read(row.oid) for row in rows if row.kind == "blob")
    assert ALICE not in repr(vars(hub_backend)) + repr(vars(hub_backend._hub)) + repr(vars(hub_backend._hub.api))


def test_a_url_in_an_error_has_no_query(hub):
    text = scrub_text(f"GET https://host.test/a/b?X-Amz-Signature=abc&x=1 failed, {ALICE}, hf_other, Bearer xyz")
    assert text == "GET https://host.test/a/b?<…> failed, <token>, <token>, <token>"
