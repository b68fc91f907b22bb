"""Forward a port of this machine's loopback to the API server in the network namespace of the cluster.

The listening socket is created in the network of the machine, and the connections in the network of the cluster: a
socket stays in the namespace in which it was created.
"""

from __future__ import annotations

import socket
import threading

from testing.controlplane.process import LOOPBACK

CHUNK_BYTES = 65536


class PortForwarder:
    """Forwards connections. Create it before `enter_own_network`; call `open` afterwards."""

    def __init__(self) -> None:
        self._outside = socket.create_server((LOOPBACK, 0))
        self.port: int = self._outside.getsockname()[1]

    def open(self, port: int) -> None:
        """Start to forward connections to a loopback port in the network namespace of this thread."""
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
    """Copy bytes until the source closes, then close the target for writing."""
    try:
        while data := source.recv(CHUNK_BYTES):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # One connection is closed; close the other one as well.
        for end in (source, target):
            end.close()
