from pathlib import Path

import pytest

from mole.experts import LibraryError
from mole.experts.address import library_path, split_expert


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("lib", Path("lib")),
        ("./lib", Path("lib")),
        ("../lib", Path("../lib")),
        ("~/lib", Path.home() / "lib"),
        ("file:///abs/lib", Path("/abs/lib")),
    ],
)
def test_a_folder_is_a_library(address, path):
    assert library_path(address) == path


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("", "give a folder"),
        ("x" * 10_000, "give a folder"),
        ("a\nb", "give a folder"),
        ("lib/../../x", "write where it leads"),
        ("https://hub.example/user/repo", "web address"),
        ("ftp://x/y", "unknown kind of library"),
        ("s3://bucket/x", "no folder; write library=s3"),
        ("file://user:word@host/x", "no user, password"),
        ("file:///x?sig=abc", "no user, password"),
        ("file:///x#y", "no user, password"),
        ("file://host/x", "another machine"),
        ("file:///a/%2e%2e/b", "percent"),
        ("file:///a/../b", "percent"),
    ],
    ids=lambda text: text[:20],
)
def test_any_other_address_is_refused_with_a_hint(address, told):
    with pytest.raises(LibraryError, match=told) as caught:
        library_path(address)
    assert "word" not in str(caught.value).replace("password", "")
    assert "sig=" not in str(caught.value)


def test_an_experts_address_is_taken_apart():
    assert split_expert("a/lib/mrpc") == ("a/lib", "mrpc", None)
    assert split_expert("lib/mrpc@3f2a91c0") == ("lib", "mrpc", "3f2a91c0")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("mrpc", "names no expert"),
        ("lib/MRPC", "how about 'mrpc'"),
        ("lib/mrpc@main", "revision 'main'"),
        ("lib/mrpc@", "revision"),
        ("lib/mrpc@3f2a", "8 to 64"),
    ],
)
def test_what_is_no_experts_address_says_why(address, told):
    with pytest.raises(LibraryError, match=told):
        split_expert(address)
