"""Addresses of libraries on the Hub: one form is taken, and what is refused says what to write."""

import pytest

from mole.experts import LibraryError
from mole.experts.address import open_backend
from mole.experts.backends.hub import HubBackend
from mole.experts.backends.hub_address import address_of_page, parse_hub_address


@pytest.mark.parametrize(
    ("address", "repo_id", "revision"),
    [
        ("hf://user/repo", "user/repo", None),
        ("hf://user/repo/", "user/repo", None),
        ("hf://user/repo@v1.0", "user/repo", "v1.0"),
        ("hf://user/repo@dev/x", "user/repo", "dev/x"),
        ("hf://U-1/r.e_p-o@" + "a" * 40, "U-1/r.e_p-o", "a" * 40),
    ],
)
def test_an_address_is_a_repository_and_a_revision(address, repo_id, revision):
    assert parse_hub_address(address) == (repo_id, revision)
    backend = open_backend(address)
    assert isinstance(backend, HubBackend)
    assert backend.url == address.rstrip("/")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hf://a", "names no repository"),
        ("hf://", "names no repository"),
        ("hf:///a/b", "names no repository"),
        ("hf://a//b", "names no repository"),
        ("hf://a/b/../c", "names no repository"),
        ("hf://../b", "names no repository"),
        ("hf://a/b%2fc", "names no repository"),
        ("hf://a/b--c", "names no repository"),
        ("hf://a/b.git", "names no repository"),
        ("hf://-a/b", "names no repository"),
        ("hf://a/" + "b" * 96, "names no repository"),
        ("hf://а/b", "names no repository"),  # Cyrillic
        ("hf://a/b c", "names no repository"),
        ("hf://a/b/c", "the library is hf://a/b"),
        ("hf://datasets/a/b", "model repositories"),
        ("hf://spaces/a/b", "model repositories"),
        ("hf://a/b@", "a branch, a tag or a commit"),
        ("hf://a/b@../x", "a branch, a tag or a commit"),
        ("hf://a/b@x@y", "a branch, a tag or a commit"),
        ("hf://a/b@x//y", "a branch, a tag or a commit"),
        ("hf://a/b@-rf", "a branch, a tag or a commit"),
        ("hf://a/b@x.lock", "a branch, a tag or a commit"),
        ("hf://a/" + "b" * 10_000, "characters"),
    ],
)
def test_any_other_address_is_refused(address, told):
    with pytest.raises(LibraryError, match=told):
        parse_hub_address(address)
    with pytest.raises(LibraryError):
        open_backend(address)


@pytest.mark.parametrize(
    "address", ["hf://hf_secret@a/b", "hf://u:hf_secret@a/b", "hf://a/b?t=hf_secret", "hf://a/b#hf_secret"]
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(address):
    for parse in (parse_hub_address, open_backend):
        with pytest.raises(LibraryError, match="no user, password, query or fragment") as caught:
            parse(address)
        assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("page", "meant"),
    [
        ("https://huggingface.co/user/repo", "hf://user/repo"),
        ("https://huggingface.co/user/repo/tree/main", "hf://user/repo"),
        ("https://hf.co/user/repo/tree/v1/mrpc", "hf://user/repo@v1"),
        ("https://huggingface.co/datasets/a/b", None),
        ("https://example.com/user/repo", None),
        ("https://[bad/user/repo", None),
    ],
)
def test_the_page_of_a_repository_tells_its_address(page, meant):
    assert address_of_page(page) == meant
    if meant:
        with pytest.raises(LibraryError, match=f"write {meant}"):
            open_backend(page)
