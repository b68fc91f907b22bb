"""Requests to the API server with the standard library: used by the control plane and by tests, not by the operator.

Called by `server`, `nodes` and tests. It has no caches and no watches. It retries only if the server has closed an idle
connection.
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

# Longer than the API server's own timeout of 60 s.
REQUEST_SECONDS = 75.0
CONTENT_TYPES = {
    "json": "application/json",
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "apply": "application/apply-patch+yaml",
}


class ControlPlaneApiError(RuntimeError):
    """The API server answered with an error."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message


class Api:
    """Requests as one user, over one persistent connection per thread."""

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
        """Patch an object or, with `.../status`, its status; `kind` is a key of CONTENT_TYPES."""
        return self.request("PATCH", path, change, CONTENT_TYPES[kind])

    def delete(self, path: str, grace_period_seconds: int | None = None) -> Any:
        """Delete an object; without a grace period, the object's own one applies."""
        options: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if grace_period_seconds is not None:
            options["gracePeriodSeconds"] = grace_period_seconds
        return self.request("DELETE", path, options)

    def request(self, method: str, path: str, body: Any = None, content_type: str = CONTENT_TYPES["json"]) -> Any:
        """Return the decoded response: JSON, or text for other types.

        Raises:
            ControlPlaneApiError: the API server answered with an error.
            OSError: there was no response.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Accept": "application/json", "Content-Type": content_type}
        response, text = self._send(method, path, data, headers)
        is_json = response.headers.get_content_type() == "application/json"
        answer = json.loads(text) if is_json else text.decode(errors="replace")
        if response.status >= http.client.BAD_REQUEST:
            status = answer if isinstance(answer, dict) else {}
            raise ControlPlaneApiError(
                response.status, status.get("reason", response.reason), status.get("message", str(answer))
            )
        return answer

    def _send(
        self, method: str, path: str, data: bytes | None, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send over this thread's connection; send again if the server had closed the idle connection."""
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
        """Return this thread's connection; it is opened on its first use."""
        if not hasattr(self._kept, "connection"):
            self._kept.connection = http.client.HTTPSConnection(
                LOOPBACK, self._port, context=self._context, timeout=REQUEST_SECONDS
            )
        connection: http.client.HTTPSConnection = self._kept.connection
        return connection


def client_context(authority: Path, client: Certificate | None = None) -> ssl.SSLContext:
    """Return a TLS context that trusts one authority, optionally with a client certificate."""
    context = ssl.create_default_context(cafile=authority)
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context
