"""Connections that send no complete request are closed in time, and their number has a limit."""

from __future__ import annotations

import asyncio
import socket
import ssl
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from finetune_contract.heartbeat import BEAT_PATH
from finetune_operator.cluster.kube.options import CoordinatorOptions
from finetune_operator.cluster.kube.term import connection_limits
from finetune_operator.coordinator import server
from finetune_operator.coordinator.beats import HeartbeatStore
from finetune_operator.coordinator.changes import JobChanges
from finetune_operator.coordinator.listener import ConnectionLimits, Listener
from finetune_operator.server import probes
from finetune_operator.settings import Settings
from testing.controlplane.pki import Authority
from testing.controlplane.process import LOOPBACK
from tests.coordinator.test_beats import NOON, beat
from tests.coordinator.test_server import TOKEN, answer, authenticate

FAST = ConnectionLimits(total=5, per_source=3, first_seconds=0.2, idle_seconds=0.2)
PATIENT = replace(FAST, first_seconds=60.0, idle_seconds=60.0)
HEAD = f"POST {BEAT_PATH} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {TOKEN}\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def coordinator(
    limits: ConnectionLimits, context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[int, Listener]]:
    running = server.Coordinator(
        HeartbeatStore(), authenticate, answer, lambda *_: None, lambda: NOON, changes=JobChanges(lambda: 60.0)
    )
    port = await running.start(LOOPBACK, 0, context, limits)
    try:
        assert running._listener is not None
        yield port, running._listener
    finally:
        await running.stop()


def request(token: str = TOKEN) -> bytes:
    body = beat().to_json()
    head = f"POST {BEAT_PATH} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {token}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


async def status_of(streams: Streams, sent: bytes) -> int:
    """Send a request and return the status of the response."""
    reader, writer = streams
    writer.write(sent)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    await reader.readexactly(int(head.partition("content-length: ")[2].split("\r\n")[0]))
    return int(head.split(" ")[1])


async def wait_closed(reader: asyncio.StreamReader) -> bytes:
    """Wait until the server closes the connection; return what it sent."""
    try:
        return await asyncio.wait_for(reader.read(), 30)
    except ConnectionError:
        return b""


@pytest.mark.parametrize("sent", [b"", b"POST", HEAD.encode()], ids=["idle", "half-line", "half-header"])
def test_a_connection_without_a_request_is_closed(sent: bytes) -> None:
    async def check() -> None:
        async with coordinator(FAST) as (port, _):
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            writer.write(sent)
            assert await wait_closed(reader) == b""

    asyncio.run(check())


def test_a_half_body_is_refused_and_its_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 0.1)

    async def check() -> None:
        async with coordinator(PATIENT) as (port, _):
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            writer.write(f"{HEAD}Content-Length: 100\r\n\r\nhalf".encode())
            assert b"408" in await wait_closed(reader)

    asyncio.run(check())


def test_a_connection_is_closed_when_it_is_idle_after_a_heartbeat() -> None:
    async def check() -> None:
        async with coordinator(PATIENT) as (port, listener):
            streams = await asyncio.open_connection(LOOPBACK, port)
            assert [await status_of(streams, request()) for _ in range(3)] == [200, 200, 200]
            (connection,) = listener._connections
            listener.limits = FAST
            connection.touch()
            connection._check()
            assert await wait_closed(streams[0]) == b""

    asyncio.run(check())


def test_a_client_without_a_tls_handshake_is_disconnected(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "here")
    issued = authority.issue("server", hosts=[LOOPBACK])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(issued.certificate, issued.key)
    trusting = ssl.create_default_context(cafile=str(authority.certificate))

    async def check() -> None:
        async with coordinator(FAST, context) as (port, listener):
            silent, _ = await asyncio.open_connection(LOOPBACK, port)
            broken, writer = await asyncio.open_connection(LOOPBACK, port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.gather(wait_closed(silent), wait_closed(broken))
            # They are no longer counted.
            listener.limits = PATIENT
            for _ in range(FAST.per_source):
                streams = await asyncio.open_connection(LOOPBACK, port, ssl=trusting)
                assert await status_of(streams, request()) == 200

    asyncio.run(check())


def test_one_address_cannot_take_all_connections(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with coordinator(PATIENT) as (port, _):
            idle = [await asyncio.open_connection(LOOPBACK, port, local_addr=("127.0.0.2", 0)) for _ in range(4)]
            await wait_closed(idle[-1][0])
            # Another address is served; the first one is served again when it has closed a connection.
            other = await asyncio.open_connection(LOOPBACK, port, local_addr=("127.0.0.3", 0))
            assert await status_of(other, request()) == 200
            idle[0][1].transport.abort()
            assert await answered(port, "127.0.0.2")

    asyncio.run(check())
    assert "refused a connection from 127.0.0.2: 3 connections are open" in caplog.text


async def answered(port: int, source: str) -> bool:
    """Connect until the server has noticed that another connection is closed; return whether it then answers."""
    async with asyncio.timeout(30):
        while True:
            streams = await asyncio.open_connection(LOOPBACK, port, local_addr=(source, 0))
            try:
                return await status_of(streams, request()) == 200
            except (ConnectionError, asyncio.IncompleteReadError):
                continue


def test_authenticated_connections_do_not_count_for_their_address_but_in_total() -> None:
    """The pods of a node may share an address. A wrong token does not help."""

    async def check() -> None:
        async with coordinator(PATIENT) as (port, _):
            opened = []
            for _ in range(PATIENT.total):
                opened.append(streams := await asyncio.open_connection(LOOPBACK, port))
                assert await status_of(streams, request()) == 200
            reader, _ = await asyncio.open_connection(LOOPBACK, port)
            await wait_closed(reader)
        async with coordinator(PATIENT) as (port, _):
            opened = []
            for _ in range(PATIENT.per_source):
                opened.append(streams := await asyncio.open_connection(LOOPBACK, port))
                assert await status_of(streams, request("wrong")) == 401
            reader, _ = await asyncio.open_connection(LOOPBACK, port)
            await wait_closed(reader)

    asyncio.run(check())


def test_accepting_continues_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example when all file descriptors of the process are in use."""
    monkeypatch.setattr("finetune_operator.coordinator.listener.ACCEPT_RETRY_SECONDS", 0.0)

    async def check() -> None:
        loop = asyncio.get_running_loop()
        errors = [OSError(24, "Too many open files")]
        accept = loop.sock_accept

        async def fail_once(*arguments: object) -> object:
            if errors:
                raise errors.pop()
            return await accept(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "sock_accept", fail_once)
        async with coordinator(PATIENT) as (port, _):
            streams = await asyncio.open_connection(LOOPBACK, port)
            assert await status_of(streams, request()) == 200
        assert errors == []

    asyncio.run(check())


def test_closed_connections_leave_nothing_behind() -> None:
    async def check() -> None:
        listener = Listener(asyncio.Protocol, PATIENT)
        port = await listener.start(LOOPBACK, 0)
        for _ in range(3 * PATIENT.total):
            _, writer = await asyncio.open_connection(LOOPBACK, port)
            writer.close()
            await writer.wait_closed()
            await until(lambda: listener.num_connections == 0)
        assert not listener._by_transport
        assert not listener._untrusted
        assert not listener._handshakes
        await listener.stop()

    asyncio.run(check())


def test_a_connection_that_was_just_accepted_is_closed_when_the_listener_stops() -> None:
    async def check() -> None:
        listener = Listener(asyncio.Protocol, PATIENT)
        await listener.start(LOOPBACK, 0)
        accepted, client = socket.socketpair()
        listener._open(accepted, "here")
        await listener.stop()
        await asyncio.sleep(0)
        assert (accepted.fileno(), listener.num_connections, dict(listener._untrusted)) == (-1, 0, {})
        client.close()

    asyncio.run(check())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  the listener has no event for it
            await asyncio.sleep(0)


def test_the_probes_port_has_limits_too() -> None:
    async def check() -> None:
        running = await probes.serve(LOOPBACK, 0, {"/livez": lambda: True}, CollectorRegistry(), FAST)
        try:
            idle, _ = await asyncio.open_connection(LOOPBACK, running.port)
            half, writer = await asyncio.open_connection(LOOPBACK, running.port)
            writer.write(b"GET /livez HTTP/1.1\r\n")
            assert list(await asyncio.gather(wait_closed(idle), wait_closed(half))) == [b"", b""]
            running._listener.limits = PATIENT
            assert await asyncio.to_thread(fetch, running.port, "/livez") == "ok\n"
            assert "finetune" not in await asyncio.to_thread(fetch, running.port, "/metrics")
        finally:
            await running.stop()

    asyncio.run(check())


def fetch(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://{LOOPBACK}:{port}{path}", timeout=30) as response:
        text: str = response.read().decode()
        return text


@pytest.mark.parametrize(("settings", "seconds"), [(Settings(), 120.0), (Settings(beat_seconds=300.0), 600.0)])
def test_a_supervisor_keeps_its_connection_between_two_heartbeats(settings: Settings, seconds: float) -> None:
    limits = connection_limits(CoordinatorOptions(max_connections=7), settings)
    assert (limits.idle_seconds, limits.total) == (seconds, 7)
