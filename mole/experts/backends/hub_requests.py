"""Requests to the Hub: asked again when it is busy, bounded in time and size, and errors that hold no token.

The client's own errors carry the request, and with it the token: they end here, and only their scrubbed text goes on.
"""

from __future__ import annotations

import functools
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

from mole import __version__
from mole.experts.errors import Damaged, LibraryError, NoLibrary, ReadOnly, Unreachable
from mole.secrets import scrub
from mole.untrusted import shown

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ANSWER_BYTES = 16 << 20
_BUSY = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
_NO_JSON = object()
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{3,}|(?i:bearer)\s+\S+")
_QUERY = re.compile(r"(https?://[^\s?'\"<>]*)\?[^\s'\"<>]*")
# What the client, and what lies under it, logs: addresses with signatures, and headers.
_LOGGERS = {
    "huggingface_hub": ("_commit_api", "file_download", "hf_api", "lfs", "utils._http", "utils._xet"),
    **dict.fromkeys(("httpx", "httpx2"), ()),
    **dict.fromkeys(("httpcore", "httpcore2"), ("connection", "http11", "http2", "proxy", "socks")),
}


@dataclass(frozen=True)
class Patience:
    """How long the Hub is asked again: `total` seconds, in pauses from `first` up to `most`; `answer`: of one answer.

    Reading gives up after a tenth of `total`.
    """

    total: float = 600.0
    first: float = 0.1
    most: float = 30.0
    answer: float = 30.0

    def pauses(self, share: float = 1.0) -> Iterator[Callable[[float], bool]]:
        """Waits, one for each time that asking again is worth it: given the least seconds, each says if it waited."""
        end, most = time.monotonic() + self.total * share, self.first
        while True:
            upto = min(most, self.most)

            def wait(least: float, upto: float = upto) -> bool:
                pause = max(least, random.uniform(upto / 2, upto))  # so that writers who met do not meet again
                if time.monotonic() + pause > end:
                    return False
                time.sleep(pause)
                return True

            yield wait
            most *= 1.6


class Missing(LibraryError):
    """The repository and the commit are there, the file or folder is not."""


class Busy(LibraryError):
    """Worth asking again, not before `after` seconds; `problem` is what to raise in the end."""

    def __init__(self, problem: LibraryError, after: float = 0.0, status: int | None = None):
        super().__init__(str(problem))
        self.problem, self.after, self.status = problem, after, status


class HubRequests:
    """One repository, as the Hub's API shows it. `what` is its address, for messages."""

    def __init__(self, repo_id: str, what: str, patience: Patience) -> None:
        self.repo_id, self.what, self.patience = repo_id, what, patience

    @functools.cached_property
    def api(self) -> Any:
        """The client; it reads its environment when it is imported, and takes the token from there or its login."""
        from huggingface_hub import HfApi

        _quieten()
        return HfApi(library_name="mole", library_version=__version__)

    @property
    def endpoint(self) -> str:
        """Where the Hub is."""
        return self.api.endpoint

    def get_json(self, path: str, **params: Any) -> tuple[Any, str | None]:
        """The JSON value at a path of the repository's API, and the address of its next page."""
        return self._json("GET", f"{self.endpoint}/api/models/{self.repo_id}{path}", params=params)

    def next_page(self, url: str) -> tuple[Any, str | None]:
        """As `get_json`, of an address that an answer gave."""
        return self._json("GET", url)

    def post_form(self, path: str, form: Mapping[str, Any]) -> Any:
        """The JSON value that a form gets."""
        return self._json("POST", f"{self.endpoint}/api/models/{self.repo_id}{path}", data=form)[0]

    def _json(self, method: str, url: str, **more: Any) -> tuple[Any, str | None]:
        def take(response: Any) -> tuple[Any, str | None]:
            body = b"".join(self.chunks(response, MAX_ANSWER_BYTES))
            value = _parsed(body)
            if value is _NO_JSON:
                raise Damaged(f"{self.what}: the Hub's answer is not JSON: {self.clean(body[:9999])}")
            following = response.links.get("next", {}).get("url")
            if following is not None and _origin(following := _joined(url, following)) != _origin(self.endpoint):
                raise Damaged(f"{self.what}: the next page lies elsewhere: {self.clean(_plain(following))}")
            return value, following

        return self.ask(method, url, take, same_host=True, **more)

    def get_file(
        self, place: str, take: Callable[[Any], T], headers: Mapping[str, str] | None = None, *, again: bool = True
    ) -> T:
        """What `take` makes of the answer that holds a file, `place` being <revision>/<path>.

        The storage that the Hub may point to gets no token. Without `again` a busy Hub is the caller's: Busy is raised.
        """
        url = f"{self.endpoint}/{self.repo_id}/resolve/{place}"
        ask = self.ask if again else self._follow
        return ask("GET", url, take, same_host=False, headers=headers)

    def chunks(self, response: Any, most: int) -> Iterator[bytes]:
        """The body of an answer, which is cut off behind `most` bytes: more is Damaged, and so is a packed one."""
        packed = response.headers.get("content-encoding", "identity")
        if packed != "identity":
            raise Damaged(f"{self.what}: the answer is packed ({self.clean(packed)}), which was not asked for")
        told = response.headers.get("content-length", "")
        left = most + 1
        for chunk in response.iter_raw() if not _exceeds(told, most) else ():
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                break
        if left <= 0 or _exceeds(told, most):
            raise Damaged(f"{self.what}: the Hub sends more than the {most:,} bytes that are wanted")

    def ask(self, method: str, url: str, take: Callable[[Any], T], *, same_host: bool, **more: Any) -> T:
        """What `take` makes of the answer; the Hub is asked again while it is busy."""
        problem: LibraryError = Unreachable(f"{self.what}: not reached")
        for number, wait in enumerate(self.patience.pauses(0.1)):
            try:
                return self._follow(method, url, take, same_host=same_host, **more)
            except Busy as error:
                problem, after = error.problem, error.after
                if number == 0:
                    self.tell_of_waiting(error, self.patience.total * 0.1)
            if not wait(after):
                break
        raise problem

    def tell_of_waiting(self, error: Busy, seconds: float) -> None:
        """A line in the log, once: without it a Hub that does not answer looks like a program that hangs."""
        level = logging.INFO if error.status in (409, 412) else logging.WARNING  # others write too: that passes
        logger.log(level, "%s; it is asked again for up to %.0f s", error.problem, seconds)

    def _follow(self, method: str, url: str, take: Callable[[Any], T], *, same_host: bool, **more: Any) -> T:
        for _ in range(_MOST_REDIRECTS):
            answer = self._once(method, url, take, **more)
            if not isinstance(answer, _Elsewhere):
                return answer
            target = _joined(url, answer.url)
            if not target.startswith(("http://", "https://")) or (same_host and _origin(target) != _origin(url)):
                raise Unreachable(f"{self.what}: the Hub points to another place: {self.clean(_plain(target))}")
            if url.startswith("https:") and target.startswith("http:"):
                raise Unreachable(f"{self.what}: the Hub points to an unprotected place: {self.clean(_plain(target))}")
            url, more = target, {key: value for key, value in more.items() if key != "params"}
        raise Unreachable(f"{self.what}: the Hub sends from place to place")

    def _once(self, method: str, url: str, take: Callable[[Any], T], **more: Any) -> Any:
        from huggingface_hub import get_session, is_offline_mode

        _ = self.api
        headers = {**self._headers(url), "accept-encoding": "identity", **(more.pop("headers", None) or {})}
        limits = {"timeout": self.patience.answer, "follow_redirects": False}
        try:
            with get_session().stream(method, url, headers=headers, **limits, **more) as response:
                if response.status_code in _REDIRECTS:
                    return _Elsewhere(response.headers.get("location", ""))
                if response.is_success:
                    return take(response)
                problem = self.refusal(response.status_code, response.headers)
        except (transport_error(), ConnectionError) as error:
            problem = self.unreachable(error)
            if not is_offline_mode():  # which does not pass by waiting
                problem = Busy(problem)
        raise problem

    def _headers(self, url: str) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        at_home = _origin(url) == _origin(self.endpoint)
        return build_hf_headers(token=None if at_home else False, library_name="mole", library_version=__version__)

    def refusal(self, status: int, headers: Mapping[str, str]) -> LibraryError:
        """What an answer of this status means."""
        code, told = headers.get("x-error-code", ""), self.clean(headers.get("x-error-message", ""))
        if code == "EntryNotFound":
            return Missing(f"{self.what}: no such file")
        if code == "RevisionNotFound":
            return NoLibrary(f"no library there: {self.what} has no such branch, tag or commit")
        if code == "GatedRepo":
            return NoLibrary(f"no library there: {self.what} is gated: ask for access on its page")
        if status == 401 and code != "RepoNotFound":
            return Unreachable(f"{self.what}: the Hub does not take your token (401): hf auth login makes a new one")
        if status in (401, 404, 410) or code == "RepoNotFound":
            return NoLibrary(
                f"no library there: {self.what} is not there, or not yours to see; log in (hf auth login, or HF_TOKEN "
                "in the environment), or make it (create=true)"
            )
        if status == 403:
            return ReadOnly(f"{self.what} is not yours to write (403): {told or 'the token has not the right'}")
        problem = Unreachable(f"{self.what}: the Hub answers {status}" + (f": {told}" if told else ""))
        return Busy(problem, _seconds(headers.get("retry-after", "")), status) if status in _BUSY else problem

    def unreachable(self, error: BaseException) -> Unreachable:
        """The error of a client, without what it carries."""
        text = self.clean(str(error)) or type(error).__name__
        problem = Unreachable(f"{self.what}: the Hub cannot be reached: {text}")
        problem.__cause__ = ConnectionError(text)
        return problem

    def clean(self, value: object) -> str:
        """What the Hub gave, for a message: escaped, cut, without tokens and signatures, which it may send back."""
        return shown(scrub_text(value if isinstance(value, str) else repr(value)), 200)[1:-1]


class _Elsewhere(NamedTuple):
    url: str


def transport_error() -> type[Exception]:
    """What the HTTP library under the client raises; which library that is differs from release to release."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]  # type: ignore[return-value]


def scrub_text(text: str) -> str:
    """Text without the user's token, or what looks like one, and without the queries of addresses."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "<token>")
    return _QUERY.sub(r"\1?<…>", _TOKEN.sub("<token>", scrub(text)))


class _Scrubbed(logging.Filter):
    """Blots tokens and signatures out of a record, before any handler sees it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub_text(record.getMessage()), ()
        if record.exc_info:
            record.exc_info = record.exc_text = None
        return True


def _quieten() -> None:
    """Scrub what the client logs; a filter works only on the very logger that it was added to."""
    for parent, children in _LOGGERS.items():
        for name in (parent, *(f"{parent}.{child}" for child in children)):
            logger = logging.getLogger(name)
            if not any(isinstance(known, _Scrubbed) for known in logger.filters):
                logger.addFilter(_Scrubbed())


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # its error holds the whole body, and so does one that is raised from here
        return _NO_JSON


def _exceeds(told: str, most: int) -> bool:
    return told.isdecimal() and (len(told) > 18 or int(told) > most)


def _joined(url: str, target: str) -> str:
    """Where an answer points to; nothing, if that is no address."""
    try:
        joined = urljoin(url, target)
    except ValueError:
        return ""
    return joined if _origin(joined)[1] else ""


def _origin(url: str) -> tuple[str, str, int]:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError:
        return "", "", 0
    return parts.scheme, (parts.hostname or "").lower(), port


def _plain(url: str) -> str:
    return url.partition("?")[0]


def _seconds(retry_after: str) -> float:
    """How long the Hub asks to wait, 0 for what cannot be read; never more than an hour."""
    if retry_after.isdecimal() and len(retry_after) < 6:
        return min(float(retry_after), 3600.0)
    try:
        return min(max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time()), 3600.0)
    except (TypeError, ValueError, IndexError):
        return 0.0
