"""What nodes of this machine need before they are started. Called by `__main__` and by `up`.

`python -m tests.realnodes.prepare` builds all that any test starts, before the tests: a build takes longer than a test
may. Where the machine cannot run nodes it says why, and builds the rest.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.controlplane.build import ALL_MODULES, HELM, BuildError, ensure_programs
from tests.realnodes.builder import LIGHT, Builder
from tests.realnodes.layers import ensure_layers
from tests.realnodes.programs import ensure_all
from tests.realnodes.runtime import MissingError, check_machine, ensure_runtime
from tests.realnodes.store import ensure_packages

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
