"""Requests to the API server with the standard library: what the test bed and its tests do behind the operator's back.

Called by `server`, `nodes` and tests. Not a client library: no caches, no watches, no retries but the one that a
connection needs that the server closed while it was idle.
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from pathlib import Path
from typing import Any

from testing.controlplane.pki import Certificate
from testing.controlplane.process import LOOPBACK

# The API server itself gives up after 60 s.
REQUEST_SECONDS = 75.0
CONTENT_TYPES = {
    "json": "application/json",
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "apply": "application/apply-patch+yaml",
}


class ApiError(RuntimeError):
    """The API server answered with an error."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message


class Api:
    """Requests as one user, over one kept connection per thread."""

    def __init__(self, port: int, context: ssl.SSLContext, token: str | None = None) -> None:
        self._port = port
        self._context = context
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._kept = threading.local()

    def get(self, path: str) -> Any:
        """Read an object, or a list of objects."""
        return self.request("GET", path)

    def create(self, path: str, manifest: dict[str, Any]) -> Any:
        """Create an object in the collection at `path`."""
        return self.request("POST", path, manifest)

    def patch(self, path: str, change: dict[str, Any], kind: str = "merge") -> Any:
        """Change an object (or, with `.../status`, its status) by a patch of a kind of CONTENT_TYPES."""
        return self.request("PATCH", path, change, CONTENT_TYPES[kind])

    def delete(self, path: str, grace_period_seconds: int | None = None) -> Any:
        """Delete an object; without a grace period its own one holds."""
        options: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if grace_period_seconds is not None:
            options["gracePeriodSeconds"] = grace_period_seconds
        return self.request("DELETE", path, options)

    def request(self, method: str, path: str, body: Any = None, content_type: str = CONTENT_TYPES["json"]) -> Any:
        """The decoded answer: JSON where it is, else text. Raises ApiError, or OSError where nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Accept": "application/json", "Content-Type": content_type}
        response, text = self._send(method, path, data, headers)
        is_json = response.headers.get_content_type() == "application/json"
        answer = json.loads(text) if is_json else text.decode(errors="replace")
        if response.status >= http.client.BAD_REQUEST:
            status = answer if isinstance(answer, dict) else {}
            raise ApiError(response.status, status.get("reason", response.reason), status.get("message", str(answer)))
        return answer

    def _send(
        self, method: str, path: str, data: bytes | None, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send over the thread's connection; once more where it was open before and the server had closed it."""
        connection = self._connection()
        was_open = connection.sock is not None
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return response, response.read()
        except (ConnectionError, ssl.SSLError):
            connection.close()
            if not was_open:
                raise
            return self._send(method, path, data, headers)
        except BaseException:
            connection.close()
            raise

    def _connection(self) -> http.client.HTTPSConnection:
        """This thread's connection; it opens itself when it is used."""
        if not hasattr(self._kept, "connection"):
            self._kept.connection = http.client.HTTPSConnection(
                LOOPBACK, self._port, context=self._context, timeout=REQUEST_SECONDS
            )
        connection: http.client.HTTPSConnection = self._kept.connection
        return connection


def trusting(authority: Path, client: Certificate | None = None) -> ssl.SSLContext:
    """TLS settings that trust one authority (its certificate), with a client's certificate or without."""
    context = ssl.create_default_context(cafile=authority)
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context
