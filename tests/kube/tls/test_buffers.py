"""Concurrent connections with a shared receive buffer do not mix up their data."""

from __future__ import annotations

import asyncio
import ssl
import sys
from asyncio import sslproto
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_operator.cluster.kube.tls import buffers
from testing.controlplane.pki import Authority
from testing.controlplane.process import LOOPBACK

NUM_CONNECTIONS = 20
NUM_BYTES = 300_000
"""Much larger than the buffer and than a TLS record."""


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("max_size", "get_buffer"):
        monkeypatch.setattr(sslproto.SSLProtocol, name, getattr(sslproto.SSLProtocol, name))
    buffers.share_receive_buffer()
    yield


@pytest.mark.usefixtures("shared")
def test_each_connection_receives_its_own_data(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "test")
    pair = authority.issue("server", hosts=[LOOPBACK])
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(pair.certificate, pair.key)
    client_side = ssl.create_default_context(cafile=str(authority.certificate))
    received: asyncio.Queue[object] = asyncio.Queue()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        protocol = writer.transport._ssl_protocol  # type: ignore[attr-defined]
        while data := await reader.read(5_000):
            writer.write(data)
            await writer.drain()
        received.put_nowait(protocol._ssl_buffer)
        writer.close()

    async def exchange(port: int, letter: int) -> bool:
        reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=client_side)
        sent = bytes([letter]) * NUM_BYTES
        writer.write(sent)
        received = await reader.readexactly(NUM_BYTES)
        writer.close()
        return received == sent

    async def main() -> tuple[list[bool], set[int]]:
        async with await asyncio.start_server(echo, LOOPBACK, 0, ssl=server_side) as server:
            port = server.sockets[0].getsockname()[1]
            answers = await asyncio.gather(*(exchange(port, number) for number in range(NUM_CONNECTIONS)))
            return answers, {id(await received.get()) for _ in range(NUM_CONNECTIONS)}

    assert asyncio.run(main()) == ([True] * NUM_CONNECTIONS, {id(buffers._buffer)})
    assert sys.getsizeof(buffers._buffer) < 2 * buffers.RECEIVE_BYTES
