"""Messages between ranks outside the collectives: the writer threads report to rank 0 which files they have written.

Only the loop's thread may start collectives. A message can arrive at any time, and only rank 0's writer waits for one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistStoreError, TCPStore  # type: ignore[attr-defined]

from finetune_trainer.distributed.world import World
from finetune_trainer.errors import FabricError

CONNECT_TIMEOUT = timedelta(seconds=60)
POLL = timedelta(milliseconds=200)


class Channel:
    """A message store on rank 0. All ranks create it together; each uses it from one thread."""

    def __init__(self, world: World) -> None:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        server = _serve(host) if world.is_first else None
        port = world.share(server.port if server else 0)
        self._store = server or _connect(host, port)

    def send(self, key: str, message: str) -> None:
        """Store a message under a key.

        Raises:
            FabricError: rank 0 is lost.
        """
        try:
            self._store.set(key, message)
        except RuntimeError as error:
            raise FabricError(f"cannot send {key} to rank 0: {error}") from error

    def receive(self, key: str, keep_waiting: Callable[[], bool]) -> str:
        """Wait for a message, and remove it from the store.

        Args:
            key: key of the message.
            keep_waiting: called several times a second; False ends the wait.

        Raises:
            FabricError: `keep_waiting` returned False.
        """
        while keep_waiting():
            try:
                self._store.wait([key], POLL)
            except DistStoreError:
                continue
            message: str = self._store.get(key).decode()
            self._store.delete_key(key)
            return message
        raise FabricError(f"stopped waiting for {key}")


def _serve(host: str) -> TCPStore:
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=CONNECT_TIMEOUT)


def _connect(host: str, port: int) -> TCPStore:
    try:
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=CONNECT_TIMEOUT)
    except RuntimeError as error:
        raise FabricError(f"cannot reach rank 0 at {host}:{port}: {error}") from error
