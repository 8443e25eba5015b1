"""Names of experts: safe as a folder on every system, in a URL, in a table; checked wherever one comes in."""

import re
import unicodedata

from mole.untrusted import LibraryError, shown

MAX_LENGTH = 96

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,94}[a-z0-9])?", re.ASCII)
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


def is_name(name: object) -> bool:
    """Whether `name` can be an expert's."""
    return (
        isinstance(name, str)
        and bool(_NAME.fullmatch(name))
        and ".." not in name
        and name.split(".")[0] not in _DEVICES
    )


def check_name(name: str) -> str:
    """The name, if it can be an expert's; LibraryError with the rule and a proposal, if not."""
    if is_name(name):
        return name
    raise LibraryError(
        f"{shown(name)} cannot be an expert's name: small letters, digits, '.', '_', '-', at most {MAX_LENGTH}, "
        f"a letter or digit first and last; how about {proposal(name)!r}?"
    )


def proposal(name: object) -> str:
    """A valid name that is like the given text: `MRPC (GLUE)` → `mrpc-glue`."""
    plain = unicodedata.normalize("NFKD", str(name)).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9._-]+", "-", plain)
    plain = re.sub(r"\.{2,}", ".", re.sub(r"-{2,}", "-", plain))[:MAX_LENGTH].strip("._-")
    if plain.split(".")[0] in _DEVICES:
        plain = f"expert-{plain}"
    return plain if is_name(plain) else "expert"
