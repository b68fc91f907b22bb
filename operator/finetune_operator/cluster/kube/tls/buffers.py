"""One buffer to receive into for all TLS connections of this process.

asyncio sets 256 KiB aside for each: a gigabyte for 4,000 supervisors. What is received goes on to OpenSSL before the
loop does anything else, so one buffer will do for all connections of one loop.
"""

from __future__ import annotations

from asyncio import sslproto
from typing import Any

RECEIVE_BYTES = 64 * 1024
RECORD_BYTES = 16 * 1024
"""Longest TLS record: there is no use in asking OpenSSL for more at a time."""

_buffer = bytearray(RECEIVE_BYTES)
_view = memoryview(_buffer)


def share() -> None:
    """Let all TLS connections that are made from now on share a buffer. For processes with one event loop."""
    sslproto.SSLProtocol.max_size = RECORD_BYTES
    sslproto.SSLProtocol.get_buffer = _get_buffer  # type: ignore[method-assign,assignment]


def _get_buffer(connection: Any, _: int) -> memoryview:
    # In place of the one that it has made for itself.
    connection._ssl_buffer, connection._ssl_buffer_view = _buffer, _view
    return _view
