"""Clean up behind a run, however it ended: its folder on the disk and its cgroups. All else goes with its namespaces.

`__main__` starts it as a process of its own, which waits until its standard input ends: where a run is killed, the
kernel sees to that. What a run left whose janitor was killed as well, the next run removes.
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
"""Beside the images, whose files the nodes share by hard links."""
PREFIX = "finetune-realnodes-"
SECONDS = 30.0
KEEP = b"keep\n"


def folder_of(run: int) -> Path:
    """Folder of a run, by its process."""
    return RUNS / f"{PREFIX}{run}"


def cgroup_of(run: int) -> str:
    """Its cgroup, in every hierarchy."""
    return f"{PREFIX}{run}"


class Janitor:
    """Cleans up behind this process."""

    def __init__(self, keep: bool = False) -> None:
        self._keep = keep

    def __enter__(self) -> Self:
        RUNS.mkdir(parents=True, exist_ok=True)
        sweep()
        command = [sys.executable, "-m", "testing.realnodes.janitor", str(os.getpid())]
        # In a session of its own, so that what ends this process' group leaves it alone.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(KEEP if self._keep else b"", timeout=2 * SECONDS)


def sweep() -> None:
    """Clean up behind runs whose process is gone."""
    left = [*RUNS.glob(f"{PREFIX}*"), *(path for top in CGROUPS.iterdir() for path in top.glob(f"{PREFIX}*"))]
    for run in {path.name.removeprefix(PREFIX) for path in left}:
        if run.isdigit() and not Path("/proc", run).exists():
            clean(int(run), keep=False)


def clean(run: int, *, keep: bool) -> None:
    """Remove what a run left; raises TimeoutError where a cgroup still holds a process."""
    wait_for(f"the cgroups of run {run} are gone", lambda: not list(remaining(run)), SECONDS)
    if not keep:
        shutil.rmtree(folder_of(run), ignore_errors=True)


def remaining(run: int) -> list[Path]:
    """Remove the cgroups of a run from the leaves up; returns those that still hold something."""
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
    """Wait for the end of the run, then clean up behind it."""
    said = sys.stdin.buffer.read()
    clean(int(sys.argv[1]), keep=said == KEEP)


if __name__ == "__main__":
    main()
