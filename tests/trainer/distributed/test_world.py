"""Meeting the other ranks: those that come before rank 0 do not sleep through its start."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

from finetune_trainer.distributed.world import await_rank_0

HOST = "127.0.0.1"


def test_a_rank_that_comes_first_goes_on_when_rank_0_listens() -> None:
    with socket.socket() as rank_0:
        # Bound, so that the port is nobody else's; nobody is let in before it listens.
        rank_0.bind((HOST, 0))
        address = rank_0.getsockname()
        waiting = threading.Thread(target=await_rank_0, args=address)
        waiting.start()
        rank_0.listen()
        rank_0.settimeout(60)
        connection, _ = rank_0.accept()
        connection.close()
        waiting.join(60)
        assert not waiting.is_alive()


def test_it_is_torch_that_says_that_nobody_came() -> None:
    with socket.socket() as nobody:
        nobody.bind((HOST, 0))
        await_rank_0(HOST, nobody.getsockname()[1], patience=timedelta(seconds=0.1))
