"""Builds everything that real nodes of this machine need. Called by `__main__` and by `up`.

`python -m testing.realnodes.prepare` builds everything that a test starts, before the tests, because a build takes
longer than the time limit of a test. On a machine that cannot run nodes it prints the reason and builds the rest.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from testing.controlplane.build import ALL_MODULES, HELM, BuildError, ensure_programs
from testing.realnodes.builder import LIGHT, Builder
from testing.realnodes.layers import ensure_layers
from testing.realnodes.programs import ensure_all
from testing.realnodes.runtime import MissingError, check_machine, ensure_runtime
from testing.realnodes.store import ensure_packages

NUM_NODES = 3


def prepare(trainer: str) -> Path:
    """Build everything that the nodes need, while the network is available; return the folder of the images."""
    check_machine()
    if trainer == LIGHT:
        ensure_packages(print_progress)
    ensure_all(print_progress)
    ensure_runtime(print_progress)
    return Builder(print_progress).ensure(trainer)


def print_progress(line: str) -> None:
    """Print a line of progress with the time, unbuffered."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def main() -> int:
    """Build what is missing; return the exit code."""
    try:
        try:
            ensure_layers(prepare(LIGHT), ensure_runtime(print_progress), print_progress)
        except MissingError as error:
            print_progress(f"cannot run real nodes on this machine: {error}")
            ensure_programs(print_progress, modules=(*ALL_MODULES, HELM))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The next build continues from here.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
