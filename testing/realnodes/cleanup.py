"""Remove the folder and the cgroups of a run, however it ended. Everything else disappears with its namespaces.

`__main__` starts this as a separate process, which waits until its standard input closes; the kernel closes it if the
run is killed. If this process is killed as well, the next run removes what is left.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from testing.controlplane.build import cache_folder
from testing.controlplane.process import wait_for

CGROUPS = Path("/sys/fs/cgroup")
RUNS = cache_folder().parent / "realnodes" / "runs"
"""Must be on the same file system as the images, because the nodes share their files by hard links."""
PREFIX = "finetune-realnodes-"
SECONDS = 30.0
KEEP = b"keep\n"


def folder_of(run: int) -> Path:
    """Return the folder of a run, given its process id."""
    return RUNS / f"{PREFIX}{run}"


def cgroup_of(run: int) -> str:
    """Return the name of the cgroup of a run in every hierarchy."""
    return f"{PREFIX}{run}"


class CleanupProcess:
    """A separate process that cleans up after this one, including after SIGKILL."""

    def __init__(self, keep: bool = False) -> None:
        self._keep = keep

    def __enter__(self) -> Self:
        RUNS.mkdir(parents=True, exist_ok=True)
        sweep()
        command = [sys.executable, "-m", "testing.realnodes.cleanup", str(os.getpid())]
        # A new session, so that a signal to the group of this process does not reach it.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(KEEP if self._keep else b"", timeout=2 * SECONDS)


def sweep() -> None:
    """Clean up after runs whose process no longer exists."""
    left = [*RUNS.glob(f"{PREFIX}*"), *(path for top in CGROUPS.iterdir() for path in top.glob(f"{PREFIX}*"))]
    for run in {path.name.removeprefix(PREFIX) for path in left}:
        if run.isdigit() and not Path("/proc", run).exists():
            clean(int(run), keep=False)


def clean(run: int, *, keep: bool) -> None:
    """Remove the cgroups and the folder of a run. Raise TimeoutError if a cgroup still contains a process."""
    wait_for(f"the cgroups of run {run} are removed", lambda: not remove_cgroups(run), SECONDS)
    if not keep:
        shutil.rmtree(folder_of(run), ignore_errors=True)


def remove_cgroups(run: int) -> list[Path]:
    """Remove the cgroups of a run, leaves first; return those that still contain a process."""
    left = []
    for top in CGROUPS.glob(f"*/{cgroup_of(run)}"):
        for path in sorted((top, *top.rglob("*")), reverse=True):
            if path.is_dir():
                try:
                    path.rmdir()
                except OSError:
                    left.append(path)
    return left


def main() -> None:
    """Wait until the run ends, then clean up."""
    clean(int(sys.argv[1]), keep=sys.stdin.buffer.read() == KEEP)


if __name__ == "__main__":
    main()
