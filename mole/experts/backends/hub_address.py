"""Addresses of libraries on the Hugging Face Hub: `hf://user/repo[@revision]`, parsed by mole itself and strictly."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit

from mole.experts.errors import LibraryError
from mole.untrusted import shown

SCHEME = "hf"
DEFAULT_BRANCH = "main"

_MOST = 512
_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_KINDS = ("datasets", "spaces", "models", "buckets", "kernels")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_FORM = "write hf://user/repository, or hf://user/repository@revision"


class HubAddress(NamedTuple):
    """A model repository and the branch, tag or commit that is meant; without one, the branch `main`."""

    repo_id: str
    revision: str | None

    @property
    def url(self) -> str:
        """The address as it is written."""
        return f"{SCHEME}://{self.repo_id}" + (f"@{self.revision}" if self.revision else "")


def parse_hub_address(address: str) -> HubAddress:
    """`hf://user/repo[@revision]`. Raises LibraryError for all else, and repeats nothing that may be a secret."""
    if len(address) > _MOST:
        raise LibraryError(f"an address of {len(address):,} characters; {_FORM}")
    scheme, separator, rest = address.partition("://")
    if scheme != SCHEME or not separator:
        raise LibraryError(f"{shown(address)} is not on the Hub; {_FORM}")
    path, at, revision = rest.partition("@")
    if "?" in rest or "#" in rest or "/" not in path:
        what = "an address holds no user, password, query or fragment: they would end in logs and configs"
        raise LibraryError(
            what if at or "?" in rest or "#" in rest else f"{shown(address)} names no repository; {_FORM}"
        )
    parts = path.rstrip("/").split("/") if not at else path.split("/")
    if parts[0] in _KINDS:
        raise LibraryError(f"{shown(address)}: experts lie in model repositories; {_FORM}")
    if len(parts) > 2 and all(_PART.fullmatch(part) for part in parts):
        raise LibraryError(f"{shown(address)} goes on behind the repository; the library is hf://{parts[0]}/{parts[1]}")
    check_repo_id("/".join(parts), address)
    return HubAddress("/".join(parts), check_revision(revision, address) if at else None)


def check_repo_id(repo_id: str, address: str | None = None) -> str:
    """The id of a repository, `user/name`, if it can be one; LibraryError with the rule, if not."""
    parts = repo_id.split("/")
    good = len(parts) == 2 and all(_PART.fullmatch(part) for part in parts) and len(repo_id) <= 96
    if good and "--" not in repo_id and ".." not in repo_id and not repo_id.endswith((".git", ".ipynb")):
        return repo_id
    raise LibraryError(
        f"{shown(address or repo_id)} names no repository: user and name of letters, digits, '.', '_', '-', a letter "
        f"or digit first, without '--' and '..', at most 96 characters; {_FORM}"
    )


def check_revision(revision: str, address: str | None = None) -> str:
    """A branch, tag or commit, if it can be one; LibraryError, if not."""
    parts = revision.split("/")
    good = _REVISION.fullmatch(revision) and ".." not in revision and "" not in parts
    if good and not any(part.startswith(".") or part.endswith((".", ".lock")) for part in parts):
        return revision
    raise LibraryError(f"{shown(address or revision)}: behind '@' stands a branch, a tag or a commit; {_FORM}")


def is_commit(revision: str) -> bool:
    """Whether a revision is the full id of a commit."""
    return bool(_COMMIT.fullmatch(revision))


def address_of_page(address: str) -> str | None:
    """The library's address, if `address` is that of a repository's page on the web; None, if not."""
    try:
        page = urlsplit(address)
        host = page.hostname
    except ValueError:
        return None
    parts = [part for part in page.path.split("/") if part]
    if page.scheme not in ("http", "https") or host not in _HOSTS or len(parts) < 2 or parts[0] in _KINDS:
        return None
    try:
        repo_id = check_repo_id("/".join(parts[:2]))
        revision = check_revision(parts[3]) if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve") else None
    except LibraryError:
        return None
    return HubAddress(repo_id, None if revision == DEFAULT_BRANCH else revision).url
