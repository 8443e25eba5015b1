"""S3 and Azure on this machine, each a process of its own with a port that it chose itself; libraries in them."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from breaking_proxy import BreakingProxy

from mole.experts import Backend, LocalBackend
from mole.experts.backends.blob import BlobBackend

AZURE_KEY = base64.b64encode(b"k" * 64).decode()  # of an account that is made for the tests, and ends with them
PLACES = ("local", "memory", "s3", "azure", "hub", "hub-xet")

_numbers = itertools.count()


@contextmanager
def served(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """Starts a server that writes where it listens; gives that address and ends the process after."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=log.parent, env={**os.environ, **environment}
        )
    try:
        until = time.monotonic() + 120
        while not (found := re.search(rb"(http://127\.0\.0\.1:[1-9]\d*)\s", log.read_bytes())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield found[1].decode()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The address of an S3 server."""
    program = Path(sys.executable).with_name("moto_server")
    if not program.exists() or importlib.util.find_spec("boto3") is None:
        pytest.skip("needs moto[server] and boto3: the extra dev")
    log = tmp_path_factory.mktemp("s3") / "log"
    with served([str(program), "-H", "127.0.0.1", "-p", "0"], log) as address:
        yield address


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory):
    """The address of an Azure Blob server, with the account `molelab`."""
    program = shutil.which(os.environ.get("MOLE_AZURITE", "azurite-blob"))
    if program is None or importlib.util.find_spec("azure.storage.blob") is None:
        pytest.skip("needs azurite-blob of npm on PATH, or its place in MOLE_AZURITE, and azure-storage-blob")
    folder = tmp_path_factory.mktemp("azure")
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", "0", *options]
    with served(command, folder / "log", AZURITE_ACCOUNTS=f"molelab:{AZURE_KEY}") as address:
        yield f"{address}/molelab"


@pytest.fixture
def open_place(request, tmp_path):
    """Opens the backend of the test's own empty library of a kind: a new object at each call, one place."""
    made = {}

    def opened(kind: str) -> Backend:
        if kind == "local":
            return LocalBackend(tmp_path / "lib")
        if kind.startswith("hub"):
            return request.getfixturevalue("open_hub")(kind)
        pytest.importorskip("obstore")
        if kind not in made:
            made[kind] = _made(kind, request)
        return BlobBackend(store_of(*made[kind]), f"{kind}://{made[kind][2] or 'here'}/lib", "lib")

    return opened


def _made(kind: str, request: pytest.FixtureRequest) -> tuple[str, object, str]:
    name = f"lib-{os.getpid()}-{next(_numbers)}"
    if kind == "memory":
        from obstore.store import MemoryStore

        return kind, MemoryStore(), ""
    address = request.getfixturevalue(f"{kind}_server")
    make_bucket(kind, address, name)
    return kind, address, name


def make_bucket(kind: str, address: str, name: str) -> None:
    """A bucket of S3, or a container of Azure."""
    if kind == "s3":
        import boto3

        keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket=name)
    else:
        from azure.storage.blob import BlobServiceClient

        with BlobServiceClient(address, credential=AZURE_KEY) as client:
            client.create_container(name)


def store_of(kind: str, address: object, name: str, *, retries: int = 3):
    """obstore's store of a bucket; `address` is the store itself for memory."""
    from obstore.store import AzureStore, S3Store

    if kind == "memory":
        return address
    pause = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
    options = {
        "endpoint": address,
        "client_options": {"allow_http": True, "timeout": "120s"},
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(seconds=120), "backoff": pause},
    }
    if kind == "s3":
        return S3Store(name, access_key_id="k", secret_access_key="s", region="us-east-1", **options)
    return AzureStore(name, account_name="molelab", account_key=AZURE_KEY, **options)


@pytest.fixture(params=["s3", "azure"])
def behind_proxy(request):
    """A proxy before a server, what opens a library behind it, and what opens the same one straight."""
    kind = request.param
    server, name = request.getfixturevalue(f"{kind}_server"), f"proxied-{os.getpid()}-{next(_numbers)}"
    make_bucket(kind, server, name)

    def opened(retries: int = 0, prefix: str = "lib", *, at: str | None = None) -> BlobBackend:
        store = store_of(kind, at or proxy.address, name, retries=retries)
        return BlobBackend(store, f"{kind}://here/{prefix}", prefix)

    with BreakingProxy(server) as proxy:
        yield proxy, opened, lambda: opened(at=server)


def make_expert_folders(make, place: Path, number: int) -> list[Path]:
    """The folders of experts with the seeds from 0."""
    folders = [place / f"expert-{seed}" for seed in range(number)]
    for seed, folder in enumerate(folders):
        make(seed).save(folder)
    return folders
