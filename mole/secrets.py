"""What must never be written down: tokens, passwords, signed addresses; how they are recognised and blotted out.

Secrets come from the environment or from the Hub's own login. They are no part of a configuration, so a key that looks
like one and has a value is refused, and whatever is written about a run has the known values replaced by their names.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

_WORDS = r"token|password|passwd|secret|api[_-]?key|access[_-]?key|private[_-]?key|connection[_-]?string|credentials?"
_KEY = re.compile(rf"(^|[_-])({_WORDS})$", re.IGNORECASE)
_VARIABLE = re.compile(rf"({_WORDS}|_key$|_pat$)", re.IGNORECASE)
_INTERPOLATION = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?([A-Za-z_][A-Za-z0-9_]*)")
_SIGNED = re.compile(r"^(sig|signature|x-amz-signature|x-amz-security-token|x-goog-signature|awsaccesskeyid)$", re.I)
_SHORTEST_PART = 8  # characters; a shorter value is looked for as a whole text, since it may be part of any word
_SHORTEST = 6  # shorter values are words like "none" or "true": replacing them would garble the text


def looks_secret(key: str) -> bool:
    """Whether a configuration key of this name would hold a secret: `hub_token` does, `max_tokens` does not."""
    return bool(_KEY.search(key))


def scrub(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """`value` (text, or lists and mappings of it) with every secret of the environment replaced by `<$ITS_NAME>`."""
    known = _known(os.environ if environment is None else environment)
    return _scrub(value, known)


def problems(node: Any, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """One line for each place of a configuration (before interpolations are resolved) that holds a secret."""
    known = _known(os.environ if environment is None else environment)
    for key, value in _leaves(node, ""):
        if value in (None, "", "???"):
            continue
        if looks_secret(key.rpartition(".")[2]):
            yield f"{key}: a secret has no place in a configuration; set it in the environment instead"
        elif isinstance(value, str):
            yield from _text_problems(key, value)
            yield from _known_problems(key, value, known)


def strip_address(url: str) -> str:
    """An address without user, password and query, fit to be printed."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def _text_problems(key: str, text: str) -> Iterator[str]:
    for variable in _INTERPOLATION.findall(text):
        if _VARIABLE.search(variable):
            yield f"{key}: reads ${variable}, which looks like a secret; mole takes it from the environment by itself"
    if "://" not in text:
        return
    try:
        parts = urlsplit(text)
    except ValueError:
        return
    signed = any(_SIGNED.match(name) or looks_secret(name) for name, _ in parse_qsl(parts.query))
    if parts.password or signed or (parts.username and parts.scheme in ("http", "https")):
        yield f"{key}: the address holds a user, password or signature; give {strip_address(text)} and log in otherwise"


def _known_problems(key: str, text: str, known: Mapping[str, str]) -> Iterator[str]:
    for secret, variable in known.items():
        if text == secret or (len(secret) >= _SHORTEST_PART and secret in text):
            yield f"{key}: holds the value of ${variable}, a secret by its name, and would be written down; take it out"
            return


def _known(environment: Mapping[str, str]) -> dict[str, str]:
    found = {v: k for k, v in environment.items() if len(v) >= _SHORTEST and _VARIABLE.search(k)}
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))  # the longest first: one may hold another


def _scrub(value: Any, known: dict[str, str]) -> Any:
    if isinstance(value, str):
        for secret, name in known.items():
            value = value.replace(secret, f"<${name}>")
        return value
    if isinstance(value, Mapping):
        return {_scrub(k, known): _scrub(v, known) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_scrub(v, known) for v in value]
    return value


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{prefix}.{index}" if prefix else str(index))
    else:
        yield prefix, node
