"""Addresses of libraries and of experts in them: which backend each opens, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import ValidationError

from mole.experts.errors import LibraryError
from mole.experts.names import check_name
from mole.registry import LIBRARIES, unknown
from mole.untrusted import shown

if TYPE_CHECKING:
    from mole.experts.backends import Backend

SCHEMES = {"file": "local", "hf": "hub", "s3": "s3", "az": "azure", "memory": "memory"}  # scheme → kind of library

_MOST = 4096
_REVISION = re.compile(r"[0-9a-f]{8,64}", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://", re.ASCII)  # one letter before the colon is a drive
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}", re.ASCII)
_SEGMENT = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]{0,127}", re.ASCII)


class BlobAddress(NamedTuple):
    """A library in a blob store: its account (of Azure; else ""), bucket or container, and prefix ("" or `a/b`)."""

    account: str
    bucket: str
    prefix: str


def open_backend(address: str, settings: Any = None) -> Backend:
    """The backend of the library at an address; `settings` is a config of the group `library`, with another url or not.

    Nothing is read, and no network used. Raises LibraryError for what is no address, and if an optional package is
    missing.
    """
    kind = kind_of(address)
    if kind == "memory":
        from mole.experts.backends.memory import memory_library

        return memory_library(address)
    variant = LIBRARIES[kind]
    if settings is not None and settings.name != kind:
        raise LibraryError(f"{shown(address)} is a library of kind {kind}, its settings are for {settings.name}")
    try:
        config = variant.config(url=address) if settings is None else dataclasses.replace(settings, url=address)
    except ValidationError as error:
        problem = error.errors()[0].get("ctx", {}).get("error", error)
    else:
        return variant.implementation(config)
    raise problem  # alone: pydantic's error repeats the whole address


def kind_of(address: str) -> str:
    """local, hub, s3, azure or memory: which of them an address names. Raises LibraryError for any other."""
    scheme = _scheme(address)
    if scheme is None:
        return "local"
    if scheme in ("http", "https"):
        from mole.experts.backends.hub_address import address_of_page

        meant = address_of_page(address)
        hint = f"write {meant}" if meant else f"give a folder or one of {_forms()}"
        raise LibraryError(f"{shown(urlsplit(address)._replace(query='').geturl())} is a web address; {hint}")
    if scheme not in SCHEMES:
        known = (*(f"{one}://" for one in SCHEMES), "a folder's path")
        raise LibraryError(unknown("kind of library", f"{scheme}://", known))
    return SCHEMES[scheme]


def library_path(address: str) -> Path:
    """The folder of a library: `lib`, `./lib`, `~/lib`, `file:///abs/lib`. LibraryError for any other address."""
    scheme = _scheme(address)
    if scheme is None:
        below = list(dropwhile(lambda part: part == "..", Path(address).parts))
        if ".." in below:  # in front it is how people point at the folder beside; further in it hides where it leads
            raise LibraryError(f"'..' inside an address: {shown(address)}; write where it leads")
        return Path(address).expanduser()
    if kind_of(address) != "local":
        raise LibraryError(f"{shown(address)} is no folder; write library={SCHEMES[scheme]} library.url={address}")
    from urllib.request import url2pathname  # an HTTP client comes with it

    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise LibraryError(f"{shown(address)} names another machine; write file:///folder/of/the/library")
    if "%" in parts.path or ".." in parts.path.split("/"):
        raise LibraryError(f"no '..' and no percent signs in an address: {shown(address)}")
    return Path(url2pathname(parts.path))


def blob_address(address: str) -> BlobAddress:
    """`s3://bucket[/prefix]` or `az://account/container[/prefix]`. LibraryError for any other address."""
    scheme = _scheme(address)
    segments = address.partition("://")[2].removesuffix("/").split("/")
    needed = {"s3": ("", "bucket"), "az": ("account", "container")}.get(scheme or "")
    if needed is None:
        raise LibraryError(f"{shown(address)} is in no blob store; write s3://bucket/prefix or az://account/container")
    account = segments.pop(0) if needed[0] else ""
    bucket = segments.pop(0) if segments else ""
    if needed[0] and not _ACCOUNT.fullmatch(account):
        raise LibraryError(f"{shown(address)}: an account has 3 to 24 small letters and digits; {_blob_form(scheme)}")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise LibraryError(
            f"{shown(address)}: a {needed[1]} has 3 to 63 small letters, digits, '.', '-'; {_blob_form(scheme)}"
        )
    for segment in segments:
        if not _SEGMENT.fullmatch(segment):
            raise LibraryError(
                f"{shown(address)}: a part of the prefix is empty, begins with '.', or has other characters than "
                f"letters, digits, '.', '_', '=', '-'; {_blob_form(scheme)}"
            )
    return BlobAddress(account, bucket, "/".join(segments))


def split_expert(address: str) -> tuple[str, str, str | None]:
    """`<library>/<name>[@<revision>]` → (library, name, revision or None). Raises LibraryError."""
    if "://" in address and any(mark in address for mark in "?#"):
        _scheme(address)  # before any part is repeated: it may be a secret
    head, _, last = address.rstrip("/").replace("\\", "/").rpartition("/")
    name, at, revision = last.partition("@")
    if not head or not name or ("://" in address and "://" not in head):
        raise LibraryError(
            f"{shown(address)} names no expert: write <library>/<name>, or the path of a folder that exists"
        )
    if at and not _REVISION.fullmatch(revision):
        raise LibraryError(f"revision {shown(revision)}: 8 to 64 small hexadecimal digits are wanted")
    return head, check_name(name), revision or None


def _scheme(address: str) -> str | None:
    """The scheme, None for a path. Raises LibraryError for what no address may hold, and repeats no secret."""
    if not address or len(address) > _MOST or any(ord(character) < 32 for character in address):
        raise LibraryError(f"not a library's address: {shown(address)}; give a folder or one of {_forms()}")
    if not _SCHEME.match(address):
        return None
    scheme, _, rest = address.partition("://")
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
        raise LibraryError("an address holds no user, password, query or fragment: they would end in logs and configs")
    return scheme.lower()


def _forms() -> str:
    return "hf://user/repository, s3://bucket/prefix, az://account/container/prefix"


def _blob_form(scheme: str | None) -> str:
    return "write s3://bucket/prefix" if scheme == "s3" else "write az://account/container/prefix"
