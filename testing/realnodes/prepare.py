"""What nodes of this machine need before they are started. Called by `__main__` and by `up`.

`python -m testing.realnodes.prepare` builds everything that a test starts, before the tests: a build takes longer than
a test may. On a machine that cannot run nodes it prints the reason and builds the rest.
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
    """Build all that nodes of this machine need, while there is its network; returns the folder of the images."""
    check_machine()
    if trainer == LIGHT:
        ensure_packages(tell)
    ensure_all(tell)
    ensure_runtime(tell)
    return Builder(tell).ensure(trainer)


def tell(line: str) -> None:
    """Progress, at once."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def main() -> int:
    """Build what is missing; returns the exit code."""
    try:
        try:
            ensure_layers(prepare(LIGHT), ensure_runtime(tell), tell)
        except MissingError as error:
            tell(f"no real nodes on this machine: {error}")
            ensure_programs(tell, modules=(*ALL_MODULES, HELM))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The next build goes on from here.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
