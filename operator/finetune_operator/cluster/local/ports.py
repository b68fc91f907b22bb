"""Ports that must survive a runner: the coordinator's, where pods send heartbeats, and each attempt's rendezvous."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

from finetune_operator.cluster.local.files import Warn, read_or_recover, write_json
from finetune_operator.cluster.local.kubelet.container import LOOPBACK

PORTS = range(15_000, 32_000)
"""Below the kernel's range for outgoing connections, so that no connection takes a port before its use."""


class JobPorts:
    """The ports of one job, stored in a file. Blocking, but fast."""

    def __init__(self, path: Path, warn: Warn) -> None:
        self._path = path
        self._coordinator, self._rendezvous = read_or_recover(path, _parse, warn) or (0, {})

    @property
    def coordinator_port(self) -> int:
        """Port that the coordinator last listened on; 0 if it never did."""
        return self._coordinator

    def keep_coordinator_port(self, port: int) -> None:
        """Store the port that the coordinator listens on."""
        if port != self._coordinator:
            self._coordinator = port
            self._write()

    def master_port(self, attempt: int) -> int:
        """Return the rendezvous port of an attempt: the same for all its pods, a new one for each attempt."""
        if attempt not in self._rendezvous:
            self._rendezvous = {attempt: find_free_port()}
            self._write()
        return self._rendezvous[attempt]

    def _write(self) -> None:
        rendezvous = {str(attempt): port for attempt, port in self._rendezvous.items()}
        write_json(self._path, {"coordinator": self._coordinator, "rendezvous": rendezvous})


def find_free_port() -> int:
    """Return a port of the loopback interface that no process listens on.

    Raises:
        OSError: no port is free.
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
