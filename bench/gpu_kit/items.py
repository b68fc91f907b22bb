"""Runs one measurement in this process: `run_order` for the zygote, or as a command with the order as its argument."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testing.gpu_kit.records import Recorder

MODULES = {
    "machine": "machine",
    "flops": "flops",
    "job_killed": "jobs",
    "jobs_compared": "jobs",
    "training": "training",
    "plain": "plain",
    "checkpoint": "saves",
    "preset": "memory",
    "adamw8bit": "memory",
}
"""Module of each function. It is imported in the process of the measurement, so that a fault in one harms no other."""
_MAX_REASON = 600


@dataclass(frozen=True)
class Context:
    """What every measurement gets.

    Attributes:
        record: where it writes what it finds.
        folder: a folder that all measurements share.
        tiny: whether to use tiny models.
    """

    record: Recorder
    folder: Path
    tiny: bool


class NotPossibleError(Exception):
    """The measurement cannot be made on this machine or with this version. The message says why."""


def run_order(order: dict[str, Any]) -> None:
    """Run a measurement as the leader of its own process group. Does not return."""
    record = Recorder(Path(order["records"]))
    try:
        if os.getpgrp() != os.getpid():
            os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        name = order["function"]
        module = importlib.import_module(f"bench.gpu_kit.{MODULES[name]}")
        measure: Callable[..., None] = getattr(module, name)
        measure(Context(record, Path(order["folder"]), order["tiny"]), **order["arguments"])
    except NotPossibleError as error:
        record.error(str(error))
    except BaseException as error:
        traceback.print_exc()
        record.error(f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MAX_REASON])
    finally:
        record.done()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    run_order(json.loads(sys.argv[1]))
