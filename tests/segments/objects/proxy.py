"""An HTTP proxy between a client and a server that does to requests what networks and servers do.

It passes the ``Host`` header on, so that signatures stay right. Each rule says what happens to the requests that it
matches, and how often.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>a fault of the proxy</Message></Error>'
_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "proxy-connection"}


@dataclass
class Rule:
    """What happens to requests whose ``METHOD path?query`` matches ``pattern``.

    ``kind`` is one of
        - an error code of S3 (``SlowDown``), answered with ``status``; the server never hears of the request
        - ``cut``: the connection ends without an answer, before the server hears of it
        - ``lost``: the server carries it out, then the connection ends without an answer
        - ``truncate``: half of the answer's body, then the connection ends
        - ``short``: half of the answer's body, declared as if it were all
        - ``stall``: half of the answer's body, then nothing
    """

    kind: str
    pattern: str = ""
    times: int = 1
    status: int = 503

    def __post_init__(self) -> None:
        self.hits = 0


class Proxy:
    """``endpoint`` is its URL. Thread-safe."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.rules: list[Rule] = []
        self.requests: list[str] = []  # "METHOD path?query range", as they came
        self.released = threading.Event()  # ends the stalls
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def rule(self, kind: str, pattern: str = "", times: int = 1, **options: Any) -> Rule:
        rule = Rule(kind, pattern, times, **options)
        with self._lock:
            self.rules.append(rule)
        return rule

    def clear(self) -> None:
        with self._lock:
            self.rules.clear()
            self.requests.clear()

    def match(self, request: str, byte_range: str) -> Rule | None:
        with self._lock:
            self.requests.append(f"{request} {byte_range}".strip())
            for rule in self.rules:
                if rule.hits < rule.times and re.search(rule.pattern, request):
                    rule.hits += 1
                    return rule
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def do_any(self) -> None:
        body = self._body()
        rule = self.owner.match(f"{self.command} {self.path}", self.headers.get("Range", ""))
        kind = rule.kind if rule else ""
        if rule and kind not in ("cut", "lost", "truncate", "short", "stall"):
            self._answer(rule.status, [("Content-Type", "application/xml")], _ERROR.format(kind).encode())
            return
        if kind == "cut":
            self._cut()
            return
        with self._forward(body) as answer:
            data = answer.read() if self.command != "HEAD" else b""
            if kind == "lost":
                self._cut()
                return
            headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP]
            if kind in ("truncate", "stall"):
                self._answer(answer.status, headers, data, send=data[: len(data) // 2])
                self.wfile.flush()
                if kind == "stall":
                    self.owner.released.wait(600)
                self._cut()
            elif kind == "short":
                self._answer(
                    answer.status, [h for h in headers if h[0].lower() != "content-length"], data[: len(data) // 2]
                )
            else:
                self._answer(answer.status, headers, data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @contextmanager
    def _forward(self, body: bytes) -> Iterator[http.client.HTTPResponse]:
        target = self.owner.target
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP | {"content-length", "expect"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            yield connection.getresponse()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, send: bytes | None = None) -> None:
        with suppress(OSError):  # who asked may be gone
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if not any(name.lower() == "content-length" for name, _ in headers):
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if send is None else send)

    def _cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: object) -> None:
        """Tests print enough."""


def wait_for(condition: Any, seconds: float = 90) -> None:
    """Wait until ``condition()`` holds; fail when it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
