"""Ports that outlive a runner: the coordinator's, which pods go on beating to, and each attempt's rendezvous."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

from finetune_operator.cluster.local.files import Warn, recover, write_json
from finetune_operator.cluster.local.kubelet.container import LOOPBACK

PORTS = range(15_000, 32_000)
"""Below the range that the kernel takes for outgoing connections, so that none of these is taken in between."""


class Endpoint:
    """The ports of one job, in a file. Blocking, but short."""

    def __init__(self, path: Path, warn: Warn) -> None:
        self._path = path
        self._coordinator, self._rendezvous = recover(path, _parse, warn) or (0, {})

    @property
    def coordinator_port(self) -> int:
        """Where the coordinator listened last; 0: it never did."""
        return self._coordinator

    def keep_coordinator_port(self, port: int) -> None:
        """Remember where it listens."""
        if port != self._coordinator:
            self._coordinator = port
            self._write()

    def master_port(self, attempt: int) -> int:
        """The rendezvous port of an attempt: the same for all its pods, another one for every attempt."""
        if attempt not in self._rendezvous:
            self._rendezvous = {attempt: free_port()}
            self._write()
        return self._rendezvous[attempt]

    def _write(self) -> None:
        rendezvous = {str(attempt): port for attempt, port in self._rendezvous.items()}
        write_json(self._path, {"coordinator": self._coordinator, "rendezvous": rendezvous})


def free_port() -> int:
    """A port of the loopback that nobody listens on.

    Raises:
        OSError: there is none.
    """
    for port in random.sample(PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {PORTS.start} and {PORTS.stop}")


def _parse(value: Any) -> tuple[int, dict[int, int]]:
    rendezvous = {int(attempt): int(port) for attempt, port in value["rendezvous"].items()}
    return int(value["coordinator"]), rendezvous
