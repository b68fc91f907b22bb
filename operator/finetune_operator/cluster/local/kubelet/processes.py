"""Processes by an identity that outlives the reuse of pids, watched through pidfds: no polling, no signal astray."""

from __future__ import annotations

import asyncio
import functools
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = "FINETUNE_LOCAL_POD"
"""Variable that every process of a pod carries: the pod's folder. It stands in for a cgroup."""
PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """A process, and no other that later gets its pid."""

    pid: int
    start_ticks: int
    """When it started, in clock ticks since the machine did (field 22 of /proc/<pid>/stat)."""
    boot_id: str

    @classmethod
    def from_json(cls, value: Any) -> ProcessId:
        """Read what `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        return cls(int(value["pid"]), int(value["startTicks"]), str(value["bootId"]))

    def to_json(self) -> dict[str, Any]:
        """Write as a JSON object."""
        return {"pid": self.pid, "startTicks": self.start_ticks, "bootId": self.boot_id}


def identify(pid: int) -> ProcessId | None:
    """The identity of a process that runs now; None where there is none, or only a zombie."""
    try:
        stat = (PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name is in parentheses and may hold any of them.
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return ProcessId(pid, int(fields[19]), boot_id())


@functools.cache
def boot_id() -> str:
    """The kernel's name for the time since the machine started."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def is_alive(process: ProcessId) -> bool:
    """Say whether it still runs."""
    return identify(process.pid) == process


async def wait_gone(process: ProcessId) -> None:
    """Wait until a process has ended, whoever its parent is."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(descriptor, gone.set)
    try:
        # The descriptor holds whatever had the pid when it was opened.
        if is_alive(process):
            await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def send_signal(process: ProcessId, number: signal.Signals) -> None:
    """Send a signal to exactly this process; that it has ended is fine."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process.pid)
        try:
            if is_alive(process):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def find_marked(folder: Path) -> list[int]:
    """Pids of the processes that carry a pod's marker, whatever became of their parents, sessions and groups."""
    wanted = f"{MARKER}={folder}".encode()
    return [pid for pid in _pids() if wanted in _environment(pid).split(b"\0")]


def kill_marked(folder: Path, patience_seconds: float = 10.0) -> bool:
    """SIGKILL all processes of a pod and see them gone. Blocking; it takes milliseconds.

    Returns:
        Whether all are gone. One in an uninterruptible read of a dead disk may stay longer than the patience.
    """
    deadline = time.monotonic() + patience_seconds
    num_empty = 0
    # A process in the middle of an exec shows no environment for an instant: one empty look is not enough.
    while num_empty < 2:
        pids = find_marked(folder)
        num_empty = 0 if pids else num_empty + 1
        for pid in pids:
            _kill(pid, folder, deadline)
        if pids and time.monotonic() >= deadline:
            return False
    return True


def _kill(pid: int, folder: Path, deadline: float) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if f"{MARKER}={folder}".encode() in _environment(pid).split(b"\0"):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)


def _pids() -> Iterator[int]:
    own = os.getpid()
    for name in os.listdir(PROC):  # noqa: PTH208  a Path for each of them would cost more than the read
        if name.isdecimal() and int(name) != own:
            yield int(name)


def _environment(pid: int) -> bytes:
    try:
        return (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return b""
