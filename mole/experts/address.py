"""Addresses of libraries and of experts in them: what is a folder, what is elsewhere, and what is refused."""

from __future__ import annotations

import re
from itertools import dropwhile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mole.experts.errors import LibraryError
from mole.experts.names import check_name
from mole.registry import unknown
from mole.untrusted import shown

SCHEMES = ("file",)

_MOST = 4096
_REVISION = re.compile(r"[0-9a-f]{8,64}", re.ASCII)


def library_path(address: str) -> Path:
    """The folder of a library: `lib`, `./lib`, `~/lib`, `file:///abs/lib`. LibraryError for any other address."""
    if not address or len(address) > _MOST or any(ord(character) < 32 for character in address):
        raise LibraryError(f"not a library's address: {shown(address)}; give a folder")
    if "://" not in address:
        below = list(dropwhile(lambda part: part == "..", Path(address).parts))
        if ".." in below:  # in front it is how people point at the folder beside; further in it hides where it leads
            raise LibraryError(f"'..' inside an address: {shown(address)}; write where it leads")
        return Path(address).expanduser()
    parts = urlsplit(address)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise LibraryError("an address holds no user, password, query or fragment: they would end in logs and configs")
    if parts.scheme in ("http", "https"):
        raise LibraryError(f"{shown(address)} is a web address, not a library's; give a folder")
    if parts.scheme not in SCHEMES:
        raise LibraryError(unknown("kind of library", f"{parts.scheme}://", ("file://", "a folder's path")))
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise LibraryError(f"{shown(address)} names another machine; write file:///folder/of/the/library")
    if "%" in parts.path or ".." in parts.path.split("/"):
        raise LibraryError(f"no '..' and no percent signs in an address: {shown(address)}")
    return Path(url2pathname(parts.path))


def split_expert(address: str) -> tuple[str, str, str | None]:
    """`<library>/<name>[@<revision>]` → (library, name, revision or None). Raises LibraryError."""
    head, _, last = address.rstrip("/").replace("\\", "/").rpartition("/")
    name, at, revision = last.partition("@")
    if not head or not name:
        raise LibraryError(
            f"{shown(address)} names no expert: write <library>/<name>, or the path of a folder that exists"
        )
    if at and not _REVISION.fullmatch(revision):
        raise LibraryError(f"revision {shown(revision)}: 8 to 64 small hexadecimal digits are wanted")
    return head, check_name(name), revision or None
