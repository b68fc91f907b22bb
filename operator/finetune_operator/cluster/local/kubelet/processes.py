"""Identifies, watches and signals processes through pidfds, without polling and safe against the reuse of pids."""

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
"""Environment variable of every process of a pod: the pod's folder. It replaces a cgroup."""
PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """Identity of a process. It differs from that of a later process with the same pid."""

    pid: int
    start_ticks: int
    """Start time in clock ticks since boot (field 22 of /proc/<pid>/stat)."""
    boot_id: str

    @classmethod
    def from_json(cls, value: Any) -> ProcessId:
        """Parse the output of `to_json`.

        Raises:
            ValueError, TypeError, KeyError: the value has another form.
        """
        return cls(int(value["pid"]), int(value["startTicks"]), str(value["bootId"]))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"pid": self.pid, "startTicks": self.start_ticks, "bootId": self.boot_id}


def identify(pid: int) -> ProcessId | None:
    """Return the identity of a running process; None if it does not exist or is a zombie."""
    try:
        stat = (PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name is in parentheses and may contain parentheses itself.
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return ProcessId(pid, int(fields[19]), boot_id())


@functools.cache
def boot_id() -> str:
    """Return the kernel's id of the current boot."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def is_alive(process: ProcessId) -> bool:
    """Return whether a process still runs."""
    return identify(process.pid) == process


async def wait_for_exit(process: ProcessId) -> None:
    """Wait until a process has ended. It need not be a child of this process."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        # The descriptor refers to the process that had the pid when it was opened.
        if is_alive(process):
            await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def send_signal(process: ProcessId, number: signal.Signals) -> None:
    """Send a signal to exactly this process. Do nothing if it has ended."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process.pid)
        try:
            if is_alive(process):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def find_marked(folder: Path) -> list[int]:
    """Return the pids of all processes with a pod's marker, independent of parents, sessions and groups."""
    marker = f"{MARKER}={folder}".encode()
    return [pid for pid in _list_pids() if marker in _read_environment(pid).split(b"\0")]


def kill_marked(folder: Path, patience_seconds: float = 10.0) -> bool:
    """SIGKILL all processes of a pod and wait until they have exited. Blocking; usually takes milliseconds.

    Returns:
        Whether all have exited. A process in an uninterruptible read of a failed disk may exceed the patience.
    """
    deadline = time.monotonic() + patience_seconds
    num_empty = 0
    # During an exec, a process has no environment for an instant: one empty scan is not enough.
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
        if f"{MARKER}={folder}".encode() in _read_environment(pid).split(b"\0"):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)


def _list_pids() -> Iterator[int]:
    own = os.getpid()
    for name in os.listdir(PROC):  # noqa: PTH208  creating Path objects would take longer than the read
        if name.isdecimal() and int(name) != own:
            yield int(name)


def _read_environment(pid: int) -> bytes:
    try:
        return (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return b""
