"""The server's side of HTTP/1.1: httptools parses, and a connection serves one request at a time.

A heartbeat needs little of a web framework. Without one it costs less CPU time, and an idle connection keeps nothing of
its last request: thousands of them are idle (docs/adr/0011-cost-of-a-supervisor-connection.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

log = logging.getLogger(__name__)

MAX_HEADERS = 32
"""Headers of a request; a supervisor sends seven."""
MAX_HEAD_BYTES = 32 * 1024
"""Received bytes that neither complete the headers nor belong to the body; a token has one or two KiB."""
MAX_UNREAD_BYTES = 16 * 1024
"""Decrypted bytes of a TLS connection that wait until the handler wants them."""
DRAIN_SECONDS = 0.1
"""Time in which the body of a refused request may arrive: then the connection can be used again."""
LINGER_SECONDS = 1.0
"""Time for which received data is dropped before a connection is closed, so that the sender gets the response."""


class BodyTooLargeError(Exception):
    """The body of a request is larger than the server reads."""


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A response; the connection adds `Date`, `Content-Length` and `Connection`."""

    status: int
    text: str
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()

    def encode(self, *, keep_alive: bool, head_only: bool = False) -> bytes:
        """Return the bytes to send."""
        body = self.text.encode()
        lines = [
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}",
            f"Date: {formatdate(usegmt=True)}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        if not keep_alive:
            lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if head_only else body)


class HttpRequest:
    """A request whose headers have arrived; its body may still be on the way."""

    __slots__ = (
        "_arrived",
        "_body",
        "_connection",
        "_is_dropped",
        "_is_too_large",
        "abandonable",
        "headers",
        "is_complete",
        "is_lost",
        "is_wanted",
        "keep_alive",
        "method",
        "path",
        "transport",
    )

    def __init__(self, connection: HttpConnection, method: str, path: str, headers: dict[str, str]) -> None:
        self.method = method
        self.path = path
        """Without the query."""
        self.headers = headers
        """By name in lower case."""
        self.transport = connection.transport
        self.keep_alive = True
        """Whether the sender may use the connection again."""
        self.is_complete = False
        """Whether the whole body has arrived."""
        self.is_lost = False
        """Whether the connection is lost, or what follows is no body."""
        self.is_wanted = False
        """Whether the body is received; more than the first part of it only after the handler has asked for it."""
        self.abandonable = False
        """Whether nothing is left to do for a sender that has closed the connection: its handler is then cancelled."""
        self._connection = connection
        self._body = bytearray()
        self._is_too_large = False
        self._is_dropped = False
        self._arrived: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """Return the body, and wait until it is complete.

        Raises:
            BodyTooLargeError: it is larger than the server reads.
            ConnectionError: the connection was lost, or what arrived is no body.
        """
        if not (self.is_complete or self._is_too_large or self.is_lost):
            await self._receive()
        if self._is_too_large:
            raise BodyTooLargeError
        if not self.is_complete:
            raise ConnectionResetError("the connection was lost before the body was complete")
        return bytes(self._body)

    async def drop(self) -> None:
        """Receive the rest of the body without storing it, for a short time."""
        self._is_dropped = True
        self._body.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._receive()

    async def _receive(self) -> None:
        self.is_wanted = True
        self._arrived = asyncio.get_running_loop().create_future()
        self._connection.continue_reading(self)
        await self._arrived

    def add(self, data: bytes, max_bytes: int) -> None:
        """Add a part of the body."""
        if self._is_dropped or self._is_too_large:
            return
        self._body += data
        if len(self._body) > max_bytes:
            self._body.clear()
            self._is_too_large = True
            self._wake()

    def complete(self) -> None:
        """Record that the body has ended."""
        self.is_complete = not self.is_lost
        self._wake()

    def release(self) -> None:
        """Free the headers and the body, which the handler no longer needs: thousands of requests may wait."""
        self.headers = {}
        self._body = bytearray()

    def lose(self) -> None:
        """Record that the rest of the body will not arrive."""
        self.is_lost = True
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)


Handler = Callable[[HttpRequest], Awaitable[HttpResponse]]


class HttpServer:
    """The open connections of a port; a `Listener` accepts them.

    Args:
        handle: returns the response to a request. An error is logged, and answered with status 500.
        max_body_bytes: largest body that is read.
    """

    def __init__(self, handle: Handler, max_body_bytes: int) -> None:
        self.handle = handle
        self.max_body_bytes = max_body_bytes
        self.is_stopping = False
        self.connections: set[HttpConnection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        """Handlers of the requests in progress, also of those whose connection is lost."""

    def new_connection(self) -> HttpConnection:
        """Return the protocol of a new connection."""
        return HttpConnection(self)

    async def stop(self, seconds: float) -> None:
        """Close all connections; those with a request get this time to answer it."""
        self.is_stopping = True
        for connection in list(self.connections):
            if connection.task is None:
                connection.close()
        if self.tasks:
            _, late = await asyncio.wait(self.tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for connection in list(self.connections):
            connection.close()


class _EndOfConnectionError(Exception):
    """Ends the parser: what follows is not read. The message is for the sender."""


class HttpConnection(asyncio.Protocol):
    """One connection. A request that arrives before the response to the one before it is not served.

    A sender that closes its side of the connection gets no response.
    """

    __slots__ = (
        "_head_bytes",
        "_headers",
        "_is_deaf",
        "_is_last",
        "_is_paused",
        "_linger",
        "_num_headers",
        "_parser",
        "_progress",
        "_request",
        "_server",
        "_url",
        "task",
        "transport",
    )

    def __init__(self, server: HttpServer) -> None:
        self.transport: asyncio.Transport | None = None
        self.task: asyncio.Task[None] | None = None
        """Handles the request in progress."""
        self._server = server
        self._parser = HttpRequestParser(self)
        self._request: HttpRequest | None = None
        self._url = b""
        self._headers: dict[str, str] = {}
        self._num_headers = 0
        self._progress = 0
        """Counts complete heads, parts of bodies and complete requests."""
        self._head_bytes = 0
        """Bytes since the last progress."""
        self._is_last = False
        """Whether the connection ends with the request in progress."""
        self._is_deaf = False
        """Whether received data is dropped."""
        self._is_paused = False
        self._linger: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._server.connections.add(self)
        # While reading is paused, asyncio still decrypts up to 256 KiB. Only its TLS transport has this method.
        if (set_limits := getattr(transport, "set_read_buffer_limits", None)) is not None:
            set_limits(high=MAX_UNREAD_BYTES)

    def connection_lost(self, _: Exception | None) -> None:
        """End. A request whose handler has more to do than to answer is still handled."""
        self._server.connections.discard(self)
        if self._linger is not None:
            self._linger.cancel()
        if self._request is not None:
            self._request.lose()
            if self._request.abandonable and self.task is not None:
                self.task.cancel()
        # Parser and connection refer to each other.
        self.transport = self._linger = self._request = None
        del self._parser

    def data_received(self, data: bytes) -> None:
        """Parse. The callbacks below start the handler as soon as the headers are complete."""
        if self._is_deaf:
            return
        progress = self._progress
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._end(HTTPStatus.BAD_REQUEST, f"this is not a valid request: {error.__context__ or error}\n")
            return
        self._head_bytes = self._head_bytes + len(data) if self._progress == progress else 0
        if self._head_bytes > MAX_HEAD_BYTES:
            self._end(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too large\n")
        elif self._request is not None and not (self._request.is_complete or self._request.is_wanted):
            # Nothing more is stored before the handler wants the body.
            self._pause()

    def pause_writing(self) -> None:
        """End the connection: its sender reads no responses."""
        if self.transport is not None:
            self.transport.abort()

    def close(self) -> None:
        """Close the connection when everything has been sent."""
        self._is_last = self._is_deaf = True
        if self._linger is not None:
            self._linger.cancel()
        # asyncio's TLS transport cannot be aborted after a second call.
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    def continue_reading(self, request: HttpRequest) -> None:
        """Receive the rest of a request's body."""
        if self.transport is None or self.transport.is_closing() or self._request is not request:
            return
        if expects_continue(request):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._resume()

    # -- called by the parser ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Begin a request."""
        if self._request is not None or self._is_last:
            raise _EndOfConnectionError("it arrived before the response to the one before it")
        self._url, self._headers, self._num_headers = b"", {}, 0

    def on_url(self, url: bytes) -> None:
        """Add a part of the path."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header."""
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            raise _EndOfConnectionError(f"it has more than {MAX_HEADERS} headers")
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        """Start the handler of the request."""
        parser = self._parser
        path = self._url.partition(b"?")[0].decode("latin-1")
        request = HttpRequest(self, parser.get_method().decode(), path, self._headers)
        request.keep_alive = parser.should_keep_alive() and parser.get_http_version() == "1.1"
        # Trailers of the body are headers, too.
        self._url, self._headers = b"", {}
        self._progress += 1
        self._request = request
        self.task = asyncio.get_running_loop().create_task(self._respond(request))
        self._server.tasks.add(self.task)
        self.task.add_done_callback(self._server.tasks.discard)

    def on_body(self, data: bytes) -> None:
        """Add a part of the body; the rest of a refused one is dropped."""
        self._progress += 1
        if self._request is not None:
            self._request.add(data, self._server.max_body_bytes)

    def on_message_complete(self) -> None:
        """End the request's body."""
        self._progress += 1
        if self._request is not None:
            self._request.complete()
        elif self._linger is not None:
            self.close()

    # ------------------------------------------------------------------------------------------------------------------

    async def _respond(self, request: HttpRequest) -> None:
        is_sent = False
        try:
            response = await self._handle(request)
            if not (request.is_complete or request.is_lost or self._is_last or expects_continue(request)):
                await request.drop()
            self._send(request, response)
            is_sent = True
        finally:
            self.task = None
            if not is_sent:
                self.close()

    async def _handle(self, request: HttpRequest) -> HttpResponse:
        try:
            return await self._server.handle(request)
        except Exception:
            log.exception("cannot answer %s %s", request.method, request.path)
            return HttpResponse(HTTPStatus.INTERNAL_SERVER_ERROR, "the request could not be handled\n")

    def _send(self, request: HttpRequest, response: HttpResponse) -> None:
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        goes_on = request.keep_alive and request.is_complete and not (self._is_last or self._server.is_stopping)
        transport.write(response.encode(keep_alive=goes_on, head_only=request.method == "HEAD"))
        self._request = None
        if goes_on:
            self._resume()
        elif request.is_complete:
            self.close()
        else:
            self._close_later()

    def _end(self, status: int, message: str) -> None:
        """Read no more: answer the request in progress, or else what is no request, and close the connection."""
        self._is_deaf = True
        if self._request is not None:
            self._is_last = True
            self._request.lose()
        elif self._is_last:
            self.close()
        elif self.transport is not None and not self.transport.is_closing():
            self.transport.write(HttpResponse(status, message).encode(keep_alive=False))
            self._close_later()

    def _close_later(self) -> None:
        """Close the connection after a while.

        If the kernel still held received data at the end, it would reset the connection, and the sender could lose the
        response.
        """
        self._is_last = True
        self._linger = asyncio.get_running_loop().call_later(LINGER_SECONDS, self.close)
        self._resume()

    def _pause(self) -> None:
        if self.transport is not None and not self._is_paused:
            self._is_paused = True
            self.transport.pause_reading()

    def _resume(self) -> None:
        if self.transport is not None and self._is_paused:
            self._is_paused = False
            self.transport.resume_reading()


def expects_continue(request: HttpRequest) -> bool:
    """Return whether the sender waits for a response to the headers before it sends the body."""
    return "100-continue" in request.headers.get("expect", "").lower()
