"""The rendezvous: ranks that start before rank 0 notice its start at once."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

from finetune_trainer.distributed.world import wait_for_rank_0

HOST = "127.0.0.1"


def test_an_early_rank_continues_when_rank_0_listens() -> None:
    with socket.socket() as rank_0:
        # Bound, to reserve the port. It accepts no connection before it listens.
        rank_0.bind((HOST, 0))
        address = rank_0.getsockname()
        waiting = threading.Thread(target=wait_for_rank_0, args=address)
        waiting.start()
        rank_0.listen()
        rank_0.settimeout(60)
        connection, _ = rank_0.accept()
        connection.close()
        waiting.join(60)
        assert not waiting.is_alive()


def test_the_wait_returns_after_its_timeout() -> None:
    with socket.socket() as silent:
        silent.bind((HOST, 0))
        began = time.monotonic()
        wait_for_rank_0(HOST, silent.getsockname()[1], timeout=timedelta(seconds=0.1))
        assert time.monotonic() - began >= 0.1
