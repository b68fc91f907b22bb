"""One receive buffer for all TLS connections of this process.

asyncio allocates 256 KiB for each connection: a gigabyte for 4,000 supervisors. Received data is passed to OpenSSL
before the event loop does anything else, so all connections of one loop can share a buffer.
"""

from __future__ import annotations

from asyncio import sslproto
from typing import Any

RECEIVE_BYTES = 64 * 1024
RECORD_BYTES = 16 * 1024
"""Maximum size of a TLS record: OpenSSL returns no more at a time."""

_buffer = bytearray(RECEIVE_BYTES)
_view = memoryview(_buffer)


def share_receive_buffer() -> None:
    """Make all TLS connections created from now on share a buffer. For processes with one event loop."""
    sslproto.SSLProtocol.max_size = RECORD_BYTES
    sslproto.SSLProtocol.get_buffer = _get_buffer  # type: ignore[method-assign,assignment]


def _get_buffer(connection: Any, _: int) -> memoryview:
    # Replaces the buffer that the connection has allocated.
    connection._ssl_buffer, connection._ssl_buffer_view = _buffer, _view
    return _view
