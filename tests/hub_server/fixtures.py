"""The test Hub as fixtures: the client of this process is pointed at it, with a token and a login of its own."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from hub_server.server import HubServer
from mole.experts.backends.hub import HubBackend
from mole.experts.backends.hub_requests import Patience

TOKENS = {"hf_aliceCanary0123456789": ["alice", "lab"], "hf_bobCanary9876543210": ["bob", "lab"]}
ALICE, BOB = TOKENS
# Short pauses; an honest answer may take as long as a busy machine needs.
HURRIED = Patience(total=120.0, first=0.005, most=0.1, answer=60.0)
BRIEF = Patience(total=2.0, first=0.005, most=0.05, answer=60.0)

# What an honest Hub may do to one request; asked again, it answers.
PASSING = [
    *({"status": status} for status in (408, 409, 412, 429, 500, 502, 503, 504)),
    {"status": 409, "times": 3},
    {"status": 503, "headers": {"Retry-After": "0"}},
    {"status": 503, "headers": {"Retry-After": "soon"}},
    {"lose_reply": True},
    {"refuse": True},
    {"cut_after": 0},
]

_numbers = itertools.count()


@pytest.fixture(scope="session")
def hub_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """The server, once for a run of the tests."""
    with HubServer(tmp_path_factory.mktemp("hub"), tokens=TOKENS, xet=True) as server:
        yield server


@pytest.fixture
def hub(hub_process: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server with an empty log and no faults; the client reaches it as alice, over LFS.

    The client reads most of its environment when it is imported, which is long before this.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    # its own pauses between its own attempts: up to 23 s for each request
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    home = hub_process.root / "home"
    for name, value in hub_process.environment(ALICE).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub_process.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    hub_process.requests.clear()
    hub_process.faults.clear()
    yield hub_process
    hub_process.faults.clear()


@pytest.fixture
def with_xet(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client use Xet, as it does by default."""
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)


@pytest.fixture
def repo_id() -> str:
    """The name of a repository that is not there."""
    return f"alice/lib-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def open_hub(hub: HubServer, repo_id: str, request: pytest.FixtureRequest) -> Callable[[str], HubBackend]:
    """Opens the test's own library on the Hub, not yet made: a new object at each call. Kinds: hub, hub-xet."""

    def opened(kind: str = "hub") -> HubBackend:
        if kind == "hub-xet":
            request.getfixturevalue("with_xet")
        return HubBackend(repo_id, create=True, patience=HURRIED)

    return opened


@pytest.fixture
def hub_backend(open_hub: Callable[[str], HubBackend]) -> HubBackend:
    """The test's own library on the Hub, over LFS; publishing makes it."""
    return open_hub("hub")
