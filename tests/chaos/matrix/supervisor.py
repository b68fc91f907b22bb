"""A supervisor that reaches the coordinator through the matrix's proxy, and exits with code 1 on SIGUSR2.

Its GPUs are a stand-in for NVML: this machine needs none. Its argument is the module that its ranks run.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from finetune_contract import environment
from finetune_trainer.supervisor.main import main
from testing.trainer import nvml_stand_in

PROXIES = "MATRIX_PROXIES"
"""Ports of the proxies by node rank, separated by commas."""
EVENTS_FOLDER = "MATRIX_GPU_EVENTS"
"""Folder with the events of the GPUs."""
GPU_EVENTS = "gpu-events"
"""Name of the file with the events of a pod's GPUs; its node rank follows."""


def fail(*_: object) -> None:
    """Exit like a program that failed."""
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, fail)
    ports = os.environ[PROXIES].split(",")
    os.environ[nvml_stand_in.EVENTS_FILE] = str(
        Path(os.environ[EVENTS_FOLDER]) / f"{GPU_EVENTS}-{os.environ[environment.NODE_RANK]}"
    )
    sys.modules["pynvml"] = nvml_stand_in
    os.environ[environment.COORDINATOR_URL] = f"http://127.0.0.1:{ports[int(os.environ[environment.NODE_RANK])]}"
    main(["--", sys.executable, "-m", sys.argv[1]])
