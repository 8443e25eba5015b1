"""Which backend an address opens, with which settings, and what is refused before anything is opened."""

import importlib.util
import subprocess
import sys

import pytest
from servers import AZURE_KEY, make_bucket, make_expert_folders

from mole.experts import LibraryError, LocalBackend
from mole.experts.address import blob_address, kind_of, open_backend
from mole.experts.backends import AzureConfig, BlobBackend, LocalConfig, S3Config


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("lib", "local"),
        ("C://lib", "local"),
        ("s3/lib", "local"),
        ("file:///lib", "local"),
        ("hf://user/repo@main", "hub"),
        ("s3://bucket/lib", "s3"),
        ("S3://bucket/lib", "s3"),
        ("az://account/container", "azure"),
        ("memory://here", "memory"),
    ],
)
def test_an_address_tells_its_kind(address, kind):
    assert kind_of(address) == kind


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("s3://bucket", ("", "bucket", "")),
        ("s3://my.bucket-1/", ("", "my.bucket-1", "")),
        ("s3://bucket/a/b_c=1/", ("", "bucket", "a/b_c=1")),
        ("az://account1/container", ("account1", "container", "")),
        ("az://account1/container/v1.2", ("account1", "container", "v1.2")),
    ],
)
def test_an_address_of_a_blob_store_is_taken_apart(address, parts):
    assert blob_address(address) == parts


BAD = [
    ("s3://", "bucket"),
    ("s3://ab", "bucket"),
    ("s3://Bucket/x", "bucket"),
    ("s3://a..b/x", "bucket"),
    ("s3://bucket//x", "prefix"),
    ("s3://bucket/../x", "prefix"),
    ("s3://bucket/a/./b", "prefix"),
    ("s3://bucket/.hidden", "prefix"),
    ("s3://bucket/a%2fb", "prefix"),
    ("s3://bucket/a b", "prefix"),
    ("s3://bucket/é", "prefix"),
    ("az://account", "container"),
    ("az://my-account/container", "account"),
    ("az://account/Container", "container"),
    ("az://account/container//x", "prefix"),
    ("memory://", "memory://name"),
    ("memory://A/B", "memory://name"),
    ("s3://key:canary@bucket/x", "no user, password"),
    ("az://account/container?sig=canary", "no user, password"),
    ("s3://bucket/x#canary", "no user, password"),
    ("ftp://x/y", "unknown kind of library"),
    ("gs://bucket/x", "unknown kind of library"),
    ("https://account.blob.core.windows.net/container", "web address"),
    ("https://huggingface.co/user/repo", "write hf://user/repo"),
    ("x" * 10_000, "not a library's address"),
    ("s3://bucket/\x00", "not a library's address"),
    ("", "not a library's address"),
]


@pytest.mark.parametrize(("address", "told"), BAD, ids=[address[:30] or "empty" for address, _ in BAD])
def test_a_bad_address_is_refused_with_a_hint_and_tells_no_secret(address, told):
    with pytest.raises(LibraryError, match=told) as caught:
        open_backend(address)
    assert "canary" not in str(caught.value)


def test_settings_of_another_kind_are_refused(tmp_path):
    with pytest.raises(LibraryError, match="of kind local, its settings are for s3"):
        open_backend(str(tmp_path), S3Config(url="s3://bucket"))
    with pytest.raises(ValueError, match="http://… or https://…"):
        S3Config(url="s3://bucket", endpoint="ftp://x")
    with pytest.raises(ValueError, match="without user and password"):
        S3Config(url="s3://bucket", endpoint="http://user:canary@x")
    with pytest.raises(ValueError, match="prefix"):
        AzureConfig(url="az://account/container/../x")


def test_a_folder_is_opened_with_settings_or_without(tmp_path):
    for settings in (None, LocalConfig(), LocalConfig(url="elsewhere")):
        backend = open_backend(str(tmp_path / "lib"), settings)
        assert isinstance(backend, LocalBackend)
        assert backend.root == tmp_path / "lib"


def test_memory_of_one_name_is_one_library(make, tmp_path):
    pytest.importorskip("obstore")
    (folder,) = make_expert_folders(make, tmp_path, 1)
    open_backend("memory://one").publish("mrpc", folder)
    assert list(open_backend("memory://one").cards()) == ["mrpc"]
    assert not open_backend("memory://other").exists()


@pytest.mark.parametrize("kind", ["s3", "azure"])
def test_a_store_is_opened_with_keys_of_the_environment_and_an_endpoint_of_the_settings(
    request, make, tmp_path, monkeypatch, kind
):
    server = request.getfixturevalue(f"{kind}_server")
    make_bucket(kind, server, f"opened-{kind}")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
    }.items():
        monkeypatch.setenv(name, value)
    if kind == "s3":
        address, settings = "s3://opened-s3/team/lib", S3Config(url="s3://other", region="us-east-1", endpoint=server)
    else:
        address, settings = "az://molelab/opened-azure/lib", AzureConfig(url="az://molelab/other", endpoint=server)
    (folder,) = make_expert_folders(make, tmp_path, 1)
    backend = open_backend(address, settings)
    assert isinstance(backend, BlobBackend)
    assert backend.url == address
    backend.publish("mrpc", folder)
    assert list(open_backend(address, settings).cards()) == ["mrpc"]


@pytest.mark.parametrize("address", ["s3://bucket", "az://account/container", "memory://x"])
def test_without_obstore_the_error_names_the_extra(monkeypatch, address):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LibraryError, match=r"mole-experts\[blob\]"):
        open_backend(address)


def test_importing_the_library_imports_no_client_of_a_store():
    code = (
        "import sys, mole.experts; print(sorted({'obstore', 'huggingface_hub', 'torch', 'boto3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
