"""HTTP for the test Hub: keep-alive, ranges, chunked requests, and the ways in which it misbehaves when asked to."""

from __future__ import annotations

import json
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import parse_qs, urlsplit

MB = 1024 * 1024


class HubError(Exception):
    """An error reply; `code` becomes the `X-Error-Code` header that the client looks at."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass
class Fault:
    """Misbehave on the next `times` requests whose "METHOD /path?query" has `match`, a regular expression, in it.

    `skip` lets that many of them pass first. `before` is called before the work is done. `status` (with `headers` and
    `body`) answers without doing the work; `rewrite` changes the body that is sent, and so its length; `cut_after`
    closes the connection after that many bytes of the body; `endless` sends the body again and again; `lose_reply` does
    the work, then closes the connection without an answer; `refuse` closes it without doing the work.
    """

    match: str
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    before: Callable[[], object] | None = None
    rewrite: Callable[[bytes], bytes] | None = None
    cut_after: int | None = None
    endless: bool = False
    lose_reply: bool = False
    refuse: bool = False
    skip: int = 0
    times: int = 1


@dataclass(frozen=True)
class Seen:
    """One request that the server answered."""

    origin: str
    method: str
    target: str
    status: int
    authorization: str | None
    range: str | None


@dataclass
class Request:
    """A parsed request; `args` are the unquoted groups of the route that matched."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: IO[bytes]
    user: str | None = None
    args: tuple[str, ...] = ()

    def json(self) -> Any:
        """The body as JSON."""
        try:
            return json.load(self.body)
        except ValueError as error:
            raise HubError(400, f"invalid JSON: {error}") from error


@dataclass
class Reply:
    """What to send; the file of a path is streamed."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Path = b""


def json_reply(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A value as JSON."""
    body = json.dumps(value).encode()
    return Reply(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, body)


class Answers(Protocol):
    """What the handler needs of the server."""

    requests: list[Seen]

    def fault_for(self, line: str) -> Fault | None: ...
    def answer(self, origin: str, req: Request) -> Reply: ...


def listen(hub: Answers, origin: str) -> ThreadingHTTPServer:
    """A server on a free port of this machine that has `hub` answer the requests to `origin`."""
    handler = type("Handler", (_Handler,), {"hub": hub, "origin": origin})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads, server.block_on_close = True, False
    return server


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some tests are about; nothing is printed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Answers
    origin: str

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent; `HubServer.requests` is the log."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        with tempfile.SpooledTemporaryFile(max_size=MB) as body:
            self._read_body(body)
            fault = self.hub.fault_for(f"{self.command} {self.path}") or Fault("")
            if fault.before is not None:
                fault.before()
            if fault.refuse:
                reply = Reply(0)
            elif fault.status is not None:
                reply = json_reply({"error": "injected fault"}, fault.status, fault.headers)
                reply.body = reply.body if fault.body is None else fault.body
            else:
                request = Request(self.command, url.path, parse_qs(url.query), self.headers, body)
                reply = self.hub.answer(self.origin, request)
        authorization = self.headers.get("Authorization")
        seen = Seen(self.origin, self.command, self.path, reply.status, authorization, self.headers.get("Range"))
        self.hub.requests.append(seen)
        if fault.rewrite is not None:
            reply.body = fault.rewrite(reply.body if isinstance(reply.body, bytes) else reply.body.read_bytes())
        if fault.lose_reply or fault.refuse:
            self._hang_up()
        elif fault.endless:
            self._send_without_end(reply)
        else:
            self._send(reply, fault.cut_after)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self, body: IO[bytes]) -> None:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body.write(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length") or 0)
            while left and (chunk := self.rfile.read(min(left, MB))):
                body.write(chunk)
                left -= len(chunk)
        body.seek(0)

    def _send(self, reply: Reply, cut_after: int | None) -> None:
        size = len(reply.body) if isinstance(reply.body, bytes) else reply.body.stat().st_size
        first, last = 0, size - 1
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted and any(wanted.groups()) and reply.status == 200 and self.command == "GET":
            first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
            last = min(int(wanted[2] or last), last) if wanted[1] else last
            if first >= size or first > last:
                reply, first, last = Reply(416, {"Content-Range": f"bytes */{size}"}), 0, -1
            else:
                reply.status = 206
                reply.headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        left = last - first + 1
        self._send_head(reply, {"Content-Length": str(left)})
        if self.command == "HEAD":
            return
        for chunk in _chunks(reply.body, first, left if cut_after is None else min(left, cut_after)):
            self.wfile.write(chunk)
        if cut_after is not None:
            self._hang_up()

    def _send_without_end(self, reply: Reply) -> None:
        self._send_head(reply, {"Connection": "close"})
        self.close_connection = True
        chunk = (reply.body if isinstance(reply.body, bytes) else reply.body.read_bytes()) or b"\0"
        while True:  # until the client has had enough
            self.wfile.write(chunk)

    def _send_head(self, reply: Reply, more: Mapping[str, str]) -> None:
        self.send_response(reply.status)
        own = {"X-Request-Id": uuid.uuid4().hex, "Last-Modified": formatdate(time.time(), usegmt=True)}
        for name, value in {**reply.headers, **own, **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _chunks(body: bytes | Path, first: int, count: int) -> Iterator[bytes]:
    if isinstance(body, bytes):
        yield body[first : first + count]
        return
    with body.open("rb") as file:
        file.seek(first)
        while count > 0 and (chunk := file.read(min(count, MB))):
            count -= len(chunk)
            yield chunk
