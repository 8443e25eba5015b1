"""A proxy on this machine between a client and a store, which counts the requests and breaks those that it is told to.

refuse: the connection ends before the request is passed on       busy: 503, not passed on
lose: it is passed on, and the connection ends without a reply    late: it is passed on, and the reply is 500
cut: half of the reply's body comes                               deny: 403 with a body that tells a secret
"""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("refuse", "busy", "lose", "late", "cut")


class BreakingProxy(ThreadingHTTPServer):
    """`plan` says what happens to the n-th request from now on (from 1); `deaf` drops the conditions of writes."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream)
        self.deaf = False
        self.always: str | None = None
        self._counting = threading.Lock()
        self.watch()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{self.upstream.path}"

    def watch(self, plan: dict[int, str] | None = None) -> None:
        """Forget the requests so far, and break those of the plan."""
        self.plan = plan or {}
        self.seen: list[str] = []
        self.hits = 0

    def kind_of(self, line: str) -> str | None:
        with self._counting:
            self.seen.append(line)
            kind = self.always or self.plan.get(len(self.seen))
            self.hits += kind is not None
            return kind

    def handle_error(self, request, client_address) -> None:
        """A client that has gone away is none of our concern."""

    def __enter__(self) -> BreakingProxy:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BreakingProxy

    def log_message(self, format, *args) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.server.kind_of(f"{self.command} {urlsplit(self.path).path}")
        if kind == "refuse":
            self.close_connection = True
        elif kind in ("busy", "deny"):
            text = b"denied to token hf_canary" if kind == "deny" else b"busy"
            self.reply(403 if kind == "deny" else 503, {}, text)
        else:
            status, headers, found = self.passed_on(body)
            if kind == "lose":
                self.close_connection = True
            elif kind == "late":
                self.reply(500, {}, b"late")
            else:
                self.reply(status, headers, found, cut=kind == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def passed_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        dropped = {"connection"} | ({"if-match", "if-none-match"} if self.server.deaf else set())
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        place = self.server.upstream
        upstream = http.client.HTTPConnection(str(place.hostname), place.port, timeout=120)
        try:
            upstream.request(self.command, self.path, body, headers)
            reply = upstream.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            upstream.close()

    def reply(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = {k.lower(): v for k, v in headers.items()}.get("content-length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut
