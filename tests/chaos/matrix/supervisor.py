"""A supervisor that reaches the coordinator through the matrix's proxy, and exits with code 1 on SIGUSR2."""

from __future__ import annotations

import os
import signal
import sys

from finetune_contract import environment
from finetune_trainer.supervisor.main import main

PROXIES = "MATRIX_PROXIES"
"""Ports of the proxies by node rank, separated by commas."""


def fail(*_: object) -> None:
    """Exit like a program that failed."""
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, fail)
    ports = os.environ[PROXIES].split(",")
    os.environ[environment.COORDINATOR_URL] = f"http://127.0.0.1:{ports[int(os.environ[environment.NODE_RANK])]}"
    main(["--", sys.executable, "-m", "tests.chaos.matrix.rank"])
