"""Accepts TCP connections within limits, and closes those that send no complete request in time.

Anybody who can reach the port can open connections, so their memory must have a bound before a token is checked.
`asyncio` and aiohttp have neither a limit of connections nor one of the time until a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

BACKLOG = 1024
"""Connections that the kernel holds until they are accepted: all supervisors connect at once to a new leader."""
ACCEPT_RETRY_SECONDS = 1.0
"""Delay after an error of accept, e.g. because there are no free file descriptors."""
SHUTDOWN_SECONDS = 5.0
"""Time limit of the end of a TLS connection."""
WARN_SECONDS = 60.0
"""Minimum time between two log lines about refused connections."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of one listening port."""

    total: int = 10_000
    """Open connections. A TLS connection with its heartbeat uses 23 KiB."""
    per_source: int = 500
    """Open connections from one address, without those of trusted senders: a node may hide its pods behind its own."""
    first_seconds: float = 10.0
    """Time until the first complete request, including the TLS handshake."""
    idle_seconds: float = 60.0
    """Time between two complete requests."""


class Listener:
    """One listening port.

    Args:
        new_protocol: creates the protocol of a connection.
        limits: see `ConnectionLimits`.
        context: None: without TLS.
    """

    def __init__(
        self,
        new_protocol: Callable[[], asyncio.Protocol],
        limits: ConnectionLimits,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.new_protocol = new_protocol
        self.limits = limits
        self._context = context
        self._connections: set[Connection] = set()
        self._by_transport: dict[asyncio.BaseTransport, Connection] = {}
        self._untrusted: Counter[str] = Counter()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None
        self._warned_at = -WARN_SECONDS

    @property
    def num_connections(self) -> int:
        """Number of open connections, including those in a TLS handshake."""
        return len(self._connections)

    async def start(self, host: str, port: int) -> int:
        """Listen; port 0 selects a free one. Return the port.

        Raises:
            OSError: the port is in use.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self._socket.setblocking(False)
        self._task = asyncio.create_task(self._accept(self._socket))
        bound: int = self._socket.getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Close the port and the connections that are still in a handshake; the server closes the others."""
        for task in (self._task, *self._handshakes):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._socket is not None:
            self._socket.close()

    def touch(self, transport: asyncio.BaseTransport | None) -> None:
        """Record a complete request: the connection may be idle from now on."""
        if transport is not None and (connection := self._by_transport.get(transport)) is not None:
            connection.touch()

    def trust(self, transport: asyncio.BaseTransport | None) -> None:
        """Record a request of an authenticated sender: its connection no longer counts for its address."""
        self.touch(transport)
        if transport is not None and (connection := self._by_transport.get(transport)) is not None:
            self._release(connection)

    async def _accept(self, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(server)
            except OSError as error:
                log.warning("cannot accept a connection: %s", error)
                await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                continue
            self._open(accepted, str(address[0]))
            # A waiting connection is accepted without a turn of the loop: a flood must not stop everything else.
            await asyncio.sleep(0)

    def _open(self, accepted: socket.socket, source: str) -> None:
        limits = self.limits
        if len(self._connections) >= limits.total or self._untrusted[source] >= limits.per_source:
            accepted.close()
            self._warn(source)
            return
        connection = Connection(self, source)
        self._connections.add(connection)
        self._untrusted[source] += 1
        task = asyncio.create_task(self._serve(accepted, connection))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)
        # A task that is cancelled before it has begun closes nothing itself.
        task.add_done_callback(lambda done: self._drop(accepted, connection) if done.cancelled() else None)

    def _warn(self, source: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._warned_at < WARN_SECONDS:
            return
        self._warned_at = now
        message = "refused a connection from %s: %d connections are open, %d without a valid token from this address"
        log.warning(message, source, len(self._connections), self._untrusted[source])

    async def _serve(self, accepted: socket.socket, connection: Connection) -> None:
        loop, options = asyncio.get_running_loop(), self._tls_options()
        try:
            await loop.connect_accepted_socket(lambda: connection, accepted, **options)
        except OSError:
            # No handshake, or not in time.
            self._drop(accepted, connection)

    def _drop(self, accepted: socket.socket, connection: Connection) -> None:
        accepted.close()
        self.forget(connection)

    def _tls_options(self) -> dict[str, Any]:
        if self._context is None:
            return {}
        return {
            "ssl": self._context,
            "ssl_handshake_timeout": self.limits.first_seconds,
            "ssl_shutdown_timeout": SHUTDOWN_SECONDS,
        }

    def adopt(self, connection: Connection, transport: asyncio.BaseTransport) -> None:
        """Record the transport of a connection whose handshake is complete."""
        self._by_transport[transport] = connection

    def forget(self, connection: Connection) -> None:
        """Drop a closed connection."""
        self._connections.discard(connection)
        if connection.transport is not None:
            self._by_transport.pop(connection.transport, None)
        self._release(connection)

    def _release(self, connection: Connection) -> None:
        if connection.trusted:
            return
        connection.trusted = True
        self._untrusted[connection.source] -= 1
        if self._untrusted[connection.source] <= 0:
            del self._untrusted[connection.source]


class Connection(asyncio.Protocol):
    """Passes everything to the server's protocol, and closes a connection that is idle for too long."""

    def __init__(self, listener: Listener, source: str) -> None:
        self.source = source
        self.trusted = False
        """Whether it no longer counts for its address."""
        self.transport: asyncio.BaseTransport | None = None
        self._listener = listener
        self._inner: asyncio.Protocol | None = None
        self._loop = asyncio.get_running_loop()
        self._closes_at = self._loop.time() + listener.limits.first_seconds
        self._timer: asyncio.TimerHandle | None = None

    def touch(self) -> None:
        """Allow the idle time from now on. The timer reads it when it is due."""
        self._closes_at = self._loop.time() + self._listener.limits.idle_seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Create the server's protocol."""
        self.transport = transport
        self._listener.adopt(self, transport)
        self._inner = self._listener.new_protocol()
        self._inner.connection_made(transport)
        self._timer = self._loop.call_at(self._closes_at, self._check)

    def _check(self) -> None:
        if self._loop.time() < self._closes_at:
            self._timer = self._loop.call_at(self._closes_at, self._check)
        elif isinstance(self.transport, asyncio.WriteTransport):
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Pass the data on."""
        if self._inner is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass the end of the data on."""
        return self._inner.eof_received() if self._inner is not None else None

    def pause_writing(self) -> None:
        """Pass it on."""
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on."""
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the server's protocol."""
        if self._timer is not None:
            self._timer.cancel()
        self._listener.forget(self)
        if self._inner is not None:
            self._inner.connection_lost(exc)
        # The transport, its protocol and this object refer to each other.
        self.transport = self._inner = None
