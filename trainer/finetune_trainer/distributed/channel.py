"""Words from rank to rank beside the collectives: the writers' threads tell rank 0 what they have written.

Collectives belong to the loop's thread; a word may come at any time, and nobody but rank 0's writer waits for one.
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
    """A store of words that rank 0 holds. Made by all ranks together; each uses it from one thread."""

    def __init__(self, world: World) -> None:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        server = _serve(host) if world.is_first else None
        port = world.share(server.port if server else 0)
        self._store = server or _connect(host, port)

    def tell(self, key: str, word: str) -> None:
        """Leave a word.

        Raises:
            FabricError: rank 0 is gone.
        """
        try:
            self._store.set(key, word)
        except RuntimeError as error:
            raise FabricError(f"rank 0 cannot be told of {key}: {error}") from error

    def hear(self, key: str, go_on: Callable[[], bool]) -> str:
        """Wait for a word, and take it out.

        Args:
            key: under which it was left.
            go_on: asked several times a second whether to wait still.

        Raises:
            FabricError: no need to wait any longer.
        """
        while go_on():
            try:
                self._store.wait([key], POLL)
            except DistStoreError:
                continue
            word: str = self._store.get(key).decode()
            self._store.delete_key(key)
            return word
        raise FabricError(f"nobody waits for {key} any more")


def _serve(host: str) -> TCPStore:
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=CONNECT_TIMEOUT)


def _connect(host: str, port: int) -> TCPStore:
    try:
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=CONNECT_TIMEOUT)
    except RuntimeError as error:
        raise FabricError(f"rank 0 cannot be reached at {host}:{port}: {error}") from error
