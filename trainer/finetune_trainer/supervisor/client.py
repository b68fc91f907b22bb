"""Posts heartbeats to the coordinator over one persistent connection. Blocking: call it from its own thread."""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from finetune_contract.heartbeat import BEAT_PATH, Heartbeat, Reply

TIMEOUT_SECONDS = 5.0


class CoordinatorError(Exception):
    """The coordinator could not be reached or refused the heartbeat."""


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

    def post(self, beat: Heartbeat) -> Reply:
        """Post one heartbeat and return the reply.

        Raises:
            CoordinatorError: no reply arrived, or its status was not 200.
        """
        fresh = self._connection is None
        try:
            return self._post_once(beat)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if fresh:
                raise CoordinatorError(f"{type(error).__name__}: {error}") from error
        # The connection may have been closed while it was idle. That does not mean that the coordinator is unreachable.
        try:
            return self._post_once(beat)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise CoordinatorError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Close the connection; the next post opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _post_once(self, beat: Heartbeat) -> Reply:
        if self._connection is None:
            self._connection = self._connect()
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            # Read the file each time: the kubelet rotates the token.
            headers["Authorization"] = f"Bearer {self._token.read_text().strip()}"
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
