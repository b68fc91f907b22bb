"""The server's side of HTTP/1.1, without a network: the transport records what is sent. See also test_server.py."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_operator.coordinator import http
from finetune_operator.coordinator.http import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    BodyTooLargeError,
    HttpConnection,
    HttpRequest,
    HttpResponse,
    HttpServer,
)

MAX_BODY = 100
TURNS = 10
"""Turns of the event loop in which a request is answered."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "DRAIN_SECONDS", 0.0)
    monkeypatch.setattr(http, "LINGER_SECONDS", 0.0)


class RecordingTransport(asyncio.Transport):
    """A connection whose other side sends only what the test feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.limit: int | None = None
        self.sent = b""
        self.is_closed = False
        self.is_paused = False
        self.is_aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.is_closed
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = self.is_aborted = True

    def set_read_buffer_limits(self, high: int) -> None:
        self.limit = high

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False


async def echo(request: HttpRequest) -> HttpResponse:
    try:
        body = await request.read()
    except BodyTooLargeError:
        return HttpResponse(413, "too large")
    except ConnectionError:
        return HttpResponse(400, "lost")
    return HttpResponse(200, f"{request.method} {request.path} {body.decode()} {request.headers.get('x', '')}")


@dataclass
class Exchange:
    """A connection to a server."""

    handle: Callable[[HttpRequest], Awaitable[HttpResponse]] = echo
    transport: RecordingTransport = field(default_factory=RecordingTransport)
    server: HttpServer = field(init=False)
    connection: HttpConnection = field(init=False)

    def __post_init__(self) -> None:
        self.server = HttpServer(self.handle, MAX_BODY)
        self.connection = self.server.new_connection()
        self.connection.connection_made(self.transport)

    async def feed(self, *parts: bytes) -> list[str]:
        """Receive these bytes, as a transport would; return the responses so far without what varies."""
        for part in parts:
            if self.transport.is_closed:
                break
            await turns()
            assert not self.transport.is_paused, "the rest is not read"
            self.connection.data_received(part)
        await turns()
        return self.responses()

    def responses(self) -> list[str]:
        """Return the status and the text of each response, and `close` if it is announced."""
        found = []
        for response in self.transport.sent.split(b"HTTP/1.1 ")[1:]:
            head, _, body = response.decode().partition("\r\n\r\n")
            assert head.startswith("100 ") or f"Content-Length: {len(body)}" in head
            found.append(" ".join([head[:3], *body.split(), *(["close"] if "Connection: close" in head else [])]))
        return found


async def turns() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


def request(
    body: str = "body", *, path: str = "/beat", head: Sequence[str] = (), version: str = "1.1", method: str = "POST"
) -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: here", f"Content-Length: {len(body)}", *head]
    return "\r\n".join([*lines, "", body]).encode()


CHUNKED = b"POST /beat HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "expected", "closed"),
    [
        (request(), ["200 POST /beat body"], False),
        (request(method="PUT", path="/other?x=1"), ["200 PUT /other body"], False),
        (request(head=["X: a", "x: b"]), ["200 POST /beat body a, b"], False),
        (request(head=["Connection: close"]), ["200 POST /beat body close"], True),
        (request(version="1.0"), ["200 POST /beat body close"], True),
        (CHUNKED, ["200 POST /beat body"], False),
        (b"\x16\x03\x01 not HTTP\r\n\r\n", ["400"], True),
        (request(head=[f"H{n}: x" for n in range(MAX_HEADERS)]), ["400"], True),
        (request(head=MAX_HEADERS * ["same: x"]), ["400"], True),
        (b"POST /" + b"x" * MAX_HEAD_BYTES, ["431"], True),
        (request(head=["X: " + "x" * MAX_HEAD_BYTES])[:-10], ["431"], True),
        (CHUNKED.replace(b"2\r\ndy", b"zz\r\ndy"), ["400 lost close"], True),
        (request(head=["Content-Length: 5"]), ["400"], True),
        (request("", head=["Upgrade: websocket", "Connection: Upgrade"]), ["200 POST /beat close"], True),
        (request() + request("next"), ["200 POST /beat body close"], True),
        (request("x" * (MAX_BODY + 1)), ["413 too large"], False),
    ],
    ids=[
        "post",
        "query",
        "same-header-twice",
        "last",
        "http-1.0",
        "chunked",
        "no-http",
        "many-headers",
        "many-values",
        "long-line",
        "long-header",
        "bad-chunk",
        "two-lengths",
        "upgrade",
        "two-at-once",
        "large",
    ],
)
def test_what_a_sender_receives(sent: bytes, expected: list[str], *, closed: bool) -> None:
    async def check() -> None:
        exchange = Exchange()
        answers = await exchange.feed(sent)
        # Refusals of the parser contain an explanation for people.
        assert [answer[: len(text)] for answer, text in zip(answers, expected, strict=True)] == expected
        assert exchange.transport.is_closed is closed
        if not closed:
            assert (await exchange.feed(request("again")))[1:] == ["200 POST /beat again"]

    asyncio.run(check())


@given(st.lists(st.integers(1, len(request(head=["X: y"])) - 1), max_size=6))
@example(list(range(1, len(request(head=["X: y"])))))
def test_the_parts_in_which_a_request_arrives_change_nothing(cuts: list[int]) -> None:
    async def check() -> None:
        sent, ends = request(head=["X: y"]), sorted({*cuts})
        parts = [sent[begin:end] for begin, end in zip([0, *ends], [*ends, len(sent)], strict=True)]
        exchange = Exchange()
        assert await exchange.feed(*parts) == ["200 POST /beat body y"]
        assert await exchange.feed(*parts) == 2 * ["200 POST /beat body y"]

    asyncio.run(check())


@given(st.lists(st.binary(max_size=60) | st.sampled_from([request()[:30], request(), CHUNKED[:70]]), max_size=5))
def test_any_bytes_leave_a_connection_that_waits_or_is_closed(parts: list[bytes]) -> None:
    async def check() -> None:
        exchange = Exchange()
        await exchange.feed(*(part for part in parts if part))
        exchange.connection.connection_lost(None)
        await turns()
        assert exchange.connection.task is None
        assert not exchange.server.connections

    asyncio.run(check())


def test_a_body_is_not_received_before_the_handler_wants_it() -> None:
    """An unknown sender is refused by its headers."""

    async def check() -> None:
        wanted = asyncio.Event()

        async def handle(request: HttpRequest) -> HttpResponse:
            await wanted.wait()
            return await echo(request)

        exchange = Exchange(handle)
        sent = request("0123456789", head=["Expect: 100-continue"])
        await exchange.feed(sent[:-8])
        assert exchange.transport.is_paused
        wanted.set()
        await turns()
        assert not exchange.transport.is_paused
        assert await exchange.feed(sent[-8:]) == ["100", "200 POST /beat 0123456789"]

    asyncio.run(check())


async def refuse(_: HttpRequest) -> HttpResponse:
    return HttpResponse(401, "who?")


@pytest.mark.parametrize(
    ("rest", "closed"),
    [(b"34567", False), (b"3456789" + request("next"), True), (b"", False)],
    ids=["part", "more", "nothing"],
)
def test_the_rest_of_a_refused_body_is_read_for_a_while_so_that_its_sender_gets_the_response(
    monkeypatch: pytest.MonkeyPatch, rest: bytes, *, closed: bool
) -> None:
    monkeypatch.setattr(http, "LINGER_SECONDS", 0.01)

    async def check() -> None:
        exchange = Exchange(refuse)
        sent = request("0123456789")
        assert await exchange.feed(sent[:-8], rest) == ["401 who? close"]
        assert exchange.transport.is_closed is closed
        await until_closed(exchange)

    asyncio.run(check())


async def until_closed(exchange: Exchange) -> None:
    async with asyncio.timeout(30):
        while not exchange.transport.is_closed:  # noqa: ASYNC110  the transport has no event for it
            await asyncio.sleep(0)


def test_a_refused_sender_keeps_its_connection_if_the_rest_of_the_body_arrives_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new connection costs a TLS handshake."""
    monkeypatch.setattr(http, "DRAIN_SECONDS", 30.0)

    async def check() -> None:
        exchange = Exchange(refuse)
        sent = request("0123456789")
        assert await exchange.feed(sent[:-8], sent[-8:-4], sent[-4:]) == ["401 who?"]
        assert await exchange.feed(request()) == 2 * ["401 who?"]
        # A sender that waits for the response to its headers gets it at once.
        sent = request("0123456789", head=["Expect: 100-continue"])
        assert (await exchange.feed(sent[:-10]))[2:] == ["401 who? close"]

    asyncio.run(check())


@pytest.mark.parametrize("drain_seconds", [0.0, 30.0])
@pytest.mark.parametrize("end", [b"0\r\nx: ", b"1;x="], ids=["trailer", "extension"])
def test_what_is_neither_head_nor_body_has_a_limit(
    monkeypatch: pytest.MonkeyPatch, drain_seconds: float, end: bytes
) -> None:
    monkeypatch.setattr(http, "DRAIN_SECONDS", drain_seconds)
    monkeypatch.setattr(http, "LINGER_SECONDS", 30.0)

    async def check() -> None:
        exchange = Exchange(refuse)
        num_parts = MAX_HEAD_BYTES // 1024
        head = b"POST /beat HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
        await exchange.feed(head, end, *(num_parts - 1) * [b"x" * 1024])
        assert not exchange.transport.is_closed
        assert not exchange.connection._is_deaf
        assert await exchange.feed(*2 * [b"x" * 1024]) == ["401 who? close"]
        # What follows is not parsed, whether the connection is closed already or waits for the sender.
        assert exchange.connection._is_deaf
        exchange.connection.connection_lost(None)

    asyncio.run(check())


def test_a_connection_decrypts_little_that_nobody_wants() -> None:
    async def check() -> None:
        assert Exchange().transport.limit == http.MAX_UNREAD_BYTES

    asyncio.run(check())


def test_the_response_to_head_has_no_body() -> None:
    async def check() -> None:
        exchange = Exchange()
        exchange.connection.data_received(b"HEAD /beat HTTP/1.1\r\nHost: here\r\n\r\n")
        await turns()
        assert exchange.transport.sent.endswith(b"\r\n\r\n")
        assert b"Content-Length: 12\r\n" in exchange.transport.sent

    asyncio.run(check())


def test_a_connection_whose_handler_was_cancelled_is_closed() -> None:
    async def cancelled(_: HttpRequest) -> HttpResponse:
        raise asyncio.CancelledError

    async def check() -> None:
        exchange = Exchange(cancelled)
        assert await exchange.feed(request()) == []
        assert exchange.transport.is_closed

    asyncio.run(check())


def test_nothing_of_a_request_stays_while_its_connection_is_idle() -> None:
    async def check() -> None:
        exchange = Exchange()
        assert await exchange.feed(request()) == ["200 POST /beat body"]
        assert not [each for each in gc.get_objects() if isinstance(each, (HttpRequest, HttpResponse))]

    gc.collect()
    asyncio.run(check())


def test_an_error_of_the_handler_is_logged_and_answered(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_: HttpRequest) -> HttpResponse:
        raise ValueError("on purpose")

    async def check() -> None:
        exchange = Exchange(fail)
        assert (await exchange.feed(request()))[0].startswith("500")
        assert (await exchange.feed(request()))[1].startswith("500")

    asyncio.run(check())
    assert "cannot answer POST /beat" in caplog.text
    assert "on purpose" in caplog.text


@pytest.mark.parametrize("abandonable", [True, False])
def test_a_request_whose_sender_has_gone_is_abandoned_when_nothing_is_left_to_do(*, abandonable: bool) -> None:
    async def check() -> None:
        released, ended = asyncio.Event(), []

        async def hold(request: HttpRequest) -> HttpResponse:
            request.abandonable = abandonable
            try:
                await released.wait()
                ended.append("handled")
            except asyncio.CancelledError:
                ended.append("abandoned")
                raise
            return HttpResponse(200, "")

        exchange = Exchange(hold)
        await exchange.feed(request())
        exchange.connection.connection_lost(None)
        await turns()
        released.set()
        await turns()
        assert ended == ["abandoned" if abandonable else "handled"]
        assert exchange.transport.sent == b""

    asyncio.run(check())


def test_a_server_that_stops_waits_for_requests_whose_sender_has_gone() -> None:
    async def check() -> None:
        released, handled = asyncio.Event(), []

        async def wait(request: HttpRequest) -> HttpResponse:
            await released.wait()
            handled.append(request.path)
            return HttpResponse(200, "")

        exchange = Exchange(wait)
        await exchange.feed(request())
        exchange.connection.connection_lost(None)
        stopping = asyncio.create_task(exchange.server.stop(30.0))
        await turns()
        assert not stopping.done()
        released.set()
        await stopping
        assert handled == ["/beat"]

    asyncio.run(check())


def test_a_sender_that_reads_no_responses_is_disconnected() -> None:
    async def check() -> None:
        exchange = Exchange()
        exchange.connection.pause_writing()
        assert exchange.transport.is_aborted

    asyncio.run(check())


def test_a_server_that_stops_answers_what_is_in_time_and_closes_everything() -> None:
    async def check() -> None:
        released = asyncio.Event()

        async def wait(request: HttpRequest) -> HttpResponse:
            if request.path == "/late":
                await asyncio.Event().wait()
            await released.wait()
            return HttpResponse(200, "")

        server = HttpServer(wait, MAX_BODY)
        transports = []
        for sent in (b"", request(), request(path="/late")):
            connection = server.new_connection()
            transports.append(transport := RecordingTransport())
            connection.connection_made(transport)
            connection.data_received(sent)
        await turns()
        stopping = asyncio.create_task(server.stop(0.1))
        await turns()
        assert [transport.is_closed for transport in transports] == [True, False, False]
        released.set()
        await stopping
        assert [transport.is_closed for transport in transports] == [True, True, True]
        assert [transport.sent[9:12] for transport in transports] == [b"", b"200", b""]
        assert b"Connection: close" in transports[1].sent

    asyncio.run(check())
