"""A door to the cluster's network: a port of this machine's loopback behind which its API server answers.

The listening socket is made in the machine's network and the connections in the cluster's: a socket stays in the
namespace that it was made in.
"""

from __future__ import annotations

import socket
import threading

from testing.controlplane.process import LOOPBACK

CHUNK_BYTES = 65536


class Door:
    """Make it before `in_own_network`, open it after."""

    def __init__(self) -> None:
        self._outside = socket.create_server((LOOPBACK, 0))
        self.port: int = self._outside.getsockname()[1]

    def open(self, port: int) -> None:
        """Lead to a port of the loopback of this thread's network from now on."""
        threading.Thread(target=self._serve, args=(port,), daemon=True).start()

    def _serve(self, port: int) -> None:
        while True:
            outer, _ = self._outside.accept()
            try:
                inner = socket.create_connection((LOOPBACK, port))
            except OSError:
                outer.close()
                continue
            for pair in ((outer, inner), (inner, outer)):
                threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Hand on what comes, and in the end that nothing more comes."""
    try:
        while data := source.recv(CHUNK_BYTES):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # One of the two is gone; so then is the other.
        for end in (source, target):
            end.close()
