"""Posts heartbeats to the coordinator over one persistent connection. Blocking: call it from its own thread."""

from __future__ import annotations

import http.client
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from finetune_contract.heartbeat import BEAT_PATH, PREFER, Heartbeat, Reply

TIMEOUT_SECONDS = 5.0
KEEP_ALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
"""A coordinator whose node has vanished is detected while it holds a reply: seconds, seconds and number of probes."""


class CoordinatorError(Exception):
    """The coordinator could not be reached or refused the heartbeat."""


class InterruptedPostError(CoordinatorError):
    """`interrupt` ended the post: the coordinator may have received the heartbeat."""


class CoordinatorClient:
    """One connection to the coordinator, opened again when it breaks."""

    def __init__(self, url: str, token: Path | None, authority: Path | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"coordinator URL {url!r} is invalid; write http://host:port or https://host:port")
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port
        self._token = token
        self._authority = authority
        self._connection: http.client.HTTPConnection | None = None
        self._interrupted = False

    def post(self, beat: Heartbeat, wait_seconds: float = 0.0) -> Reply:
        """Post one heartbeat and return the reply.

        Args:
            beat: the heartbeat.
            wait_seconds: time for which the coordinator may keep the reply until it contains news.

        Raises:
            InterruptedPostError: `interrupt` was called in another thread.
            CoordinatorError: no reply arrived, or its status was not 200.
        """
        self._interrupted = False
        fresh = self._connection is None
        try:
            return self._post_once(beat, wait_seconds)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # ValueError: the token's file contains what no header may contain.
            self.close()
            if self._interrupted:
                raise InterruptedPostError("a newer heartbeat is due") from error
            # A coordinator that does not answer at all is not asked to hold the next reply in the same call.
            if fresh or (wait_seconds > 0 and isinstance(error, TimeoutError)):
                raise CoordinatorError(f"{type(error).__name__}: {error}") from error
        # The connection may have been closed while it was idle. That does not mean that the coordinator is unreachable.
        try:
            return self._post_once(beat, wait_seconds)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            if self._interrupted:
                raise InterruptedPostError("a newer heartbeat is due") from error
            raise CoordinatorError(f"{type(error).__name__}: {error}") from error

    def interrupt(self) -> None:
        """End a post that waits in another thread, by the end of its connection."""
        self._interrupted = True
        connection = self._connection
        # Read once: the other thread may close the connection.
        connected = connection.sock if connection is not None else None
        if connected is not None:
            with suppress(OSError):
                # Not by the TLS socket's own method: a write in the other thread would then be sent without TLS.
                socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next post opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _post_once(self, beat: Heartbeat, wait_seconds: float) -> Reply:
        if self._connection is None:
            self._connection = self._connect()
        _connected(self._connection).settimeout(TIMEOUT_SECONDS + wait_seconds)
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            # Read the file each time: the kubelet rotates the token.
            headers["Authorization"] = f"Bearer {self._token.read_text().strip()}"
        if wait_seconds > 0:
            headers[PREFER] = f"wait={wait_seconds:.0f}"
        self._connection.request("POST", BEAT_PATH, body=beat.to_json().encode(), headers=headers)
        response = self._connection.getresponse()
        body = response.read()
        if response.status != http.client.OK:
            raise CoordinatorError(f"HTTP {response.status}: {body[:300].decode(errors='replace')}")
        try:
            return Reply.model_validate_json(body)
        except ValueError as error:
            raise CoordinatorError(f"invalid reply: {body[:300]!r}") from error

    def _connect(self) -> http.client.HTTPConnection:
        if not self._secure:
            return http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_SECONDS)
        context = ssl.create_default_context(cafile=str(self._authority) if self._authority else None)
        return http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_SECONDS, context=context)


def _connected(connection: http.client.HTTPConnection) -> socket.socket:
    """Return the socket of a connection, which is opened if it is not."""
    is_new = connection.sock is None
    if is_new:
        connection.connect()
    connected: socket.socket = connection.sock
    if is_new:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            # Not every system has all of them.
            if (option := getattr(socket, name, None)) is not None:
                connected.setsockopt(socket.IPPROTO_TCP, option, value)
    return connected
