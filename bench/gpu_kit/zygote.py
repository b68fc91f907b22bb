"""Imports the libraries once and forks a process for each measurement.

Reads orders as JSON lines from standard input and answers each with the process's pid. The device is never used here: a
process that has opened it cannot fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from bench.gpu_kit.items import run_order
from finetune_trainer import libraries


def main() -> None:
    """Import, then serve until the input is closed."""
    began = time.monotonic()
    # The libraries may print; only answers belong to the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    libraries.prepare(os.environ)
    libraries.preload()
    # The kernel removes ended measurements; the driver watches them by their pidfd.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    answers.write(json.dumps({"seconds": time.monotonic() - began}) + "\n")
    answers.flush()
    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            run_order(json.loads(line))
        answers.write(json.dumps({"pid": pid}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
