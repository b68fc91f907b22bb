"""A proxy in front of the S3 server of the tests that fails requests: it answers SlowDown, resets, or stays silent.

It forwards the others unchanged, with their signatures. Clients use it instead of the server.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from testing.controlplane.process import LOOPBACK
from testing.hub import CUT, RESET, STALL, Fault
from testing.objectstore.server import ObjectStore

SLOW_DOWN = Fault(503)
"""How S3 limits the rate of requests."""
FAULTS: Mapping[str, Fault] = {"slow down": SLOW_DOWN, "reset": RESET, "silence": STALL, "cut": CUT}
_SLOW_DOWN_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_NO_LINGER = struct.pack("ii", 1, 0)
"""Socket option that makes a close send a reset."""


@dataclass
class FaultyStore:
    """A running proxy. Its methods can be called from any thread.

    Attributes:
        upstream: host and port of the server.
        num_requests: number of requests so far.
        num_failed: number of them that were failed.
        num_parts: number of parts of multipart uploads that the server has stored.
        before_request: receives the method and the path of each request before it is forwarded.
        change_body: returns the contents to forward, from the method and path of a request and its own contents.
    """

    upstream: str
    num_requests: int = 0
    num_failed: int = 0
    num_parts: int = 0
    before_request: Callable[[str], None] = lambda _: None
    change_body: Callable[[str, bytes], bytes] = lambda _, body: body
    _fault: Fault | None = None
    _only: str = ""
    _left: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, fault: Fault, times: int = 10**9, only: str = "") -> None:
        """Fail the next `times` requests whose method and path contain `only`."""
        with self._lock:
            self._fault, self._left, self._only = fault, times, only

    def recover(self) -> None:
        """Forward all further requests."""
        with self._lock:
            self._left = 0

    def register(self, request: str) -> Fault | None:
        """Count a request, given as its method and path, and return its fault."""
        self.before_request(request)
        with self._lock:
            self.num_requests += 1
            if self._left <= 0 or self._only not in request:
                return None
            self._left -= 1
            self.num_failed += 1
            return self._fault


@contextlib.contextmanager
def serve(store: ObjectStore) -> Iterator[tuple[FaultyStore, Mapping[str, str]]]:
    """Run a proxy within this block. Yield it with the environment of its clients."""
    proxy = FaultyStore(urllib.parse.urlparse(store.environment["AWS_ENDPOINT_URL"]).netloc)
    server = _Server(proxy)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy, {**store.environment, "AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{server.server_address[1]}"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, proxy: FaultyStore) -> None:
        super().__init__((LOOPBACK, 0), _Handler)
        self.proxy = proxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have gone."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.headers.get("Expect"):
            self.send_response_only(http.HTTPStatus.CONTINUE)
            self.end_headers()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.proxy.register(f"{self.command} {self.path}")
        if fault is None or fault.cut:
            body = self.server.proxy.change_body(f"{self.command} {self.path}", body)
            self._forward(body, cut=fault is not None)
        elif fault.status:
            self._send(fault.status, {"Content-Type": "application/xml"}, _SLOW_DOWN_BODY)
        else:
            if fault.stall:
                with contextlib.suppress(OSError):
                    self.connection.recv(1)
            self._reset()

    def _forward(self, body: bytes, *, cut: bool) -> None:
        upstream = http.client.HTTPConnection(self.server.proxy.upstream)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
            if self.command == "PUT" and "partNumber=" in self.path and answer.status == http.HTTPStatus.OK:
                self.server.proxy.num_parts += 1
            kept = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in ("transfer-encoding", "connection", "content-length")
            }
            length = int(answer.headers.get("Content-Length") or len(data))
            self._send(answer.status, kept, data, length, cut=cut)
        finally:
            upstream.close()

    def _send(
        self, status: int, headers: Mapping[str, str], body: bytes, length: int | None = None, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.connection.close()
