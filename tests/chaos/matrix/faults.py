"""Injects faults into processes, disks and connections of this machine. Disks and partitions need root."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_SYS_PIDFD_GETFD = 438
_SO_ATTACH_FILTER = 26
_libc = ctypes.CDLL(None, use_errno=True)
CGROUPS = Path("/sys/fs/cgroup/memory")
LIMIT_BYTES = 64 * 1024**2


def signal_all(pids: list[int], number: int) -> None:
    """Send a signal to processes; ignore those that have exited."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def cut_off(pid: int) -> None:
    """Drop all packets to the existing TCP connections of a process, like a broken network.

    Attach a filter that keeps no byte of any packet to copies of its sockets.
    """
    process = os.pidfd_open(pid)
    try:
        for descriptor in _sockets(pid):
            copy = _libc.syscall(_SYS_PIDFD_GETFD, process, descriptor, 0)
            if copy < 0:
                continue
            with socket.socket(fileno=copy) as duplicate:
                if duplicate.family in (socket.AF_INET, socket.AF_INET6):
                    duplicate.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _drop_all())
    finally:
        os.close(process)


def _sockets(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if str(path.readlink()).startswith("socket:"):
                found.append(int(path.name))
    return found


_KEEP_NOTHING = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))


def _drop_all() -> bytes:
    """Return a classic BPF program with one instruction: return 0."""
    return struct.pack("HL", 1, ctypes.addressof(_KEEP_NOTHING))


def forbid_writes(pid: int) -> None:
    """Forbid a process to write to files: a full disk for one of the ranks that share it."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))


def mount_private_read_only(pid: int, folder: Path) -> None:
    """Make a folder read-only in the mount namespace of a process."""
    command = ["nsenter", "-t", str(pid), "-m", "mount", "-o", "remount,bind,ro", str(folder)]
    subprocess.run(command, check=True)


def starve(pid: int, name: str) -> Callable[[], None]:
    """Put a process into its own memory cgroup with a limit that the kernel's OOM killer enforces.

    Returns:
        A function that removes the cgroup.
    """
    group = CGROUPS / name
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    (group / "cgroup.procs").write_text(str(pid))
    os.kill(pid, signal.SIGUSR1)

    def undo() -> None:
        with suppress(OSError):
            for left in (group / "cgroup.procs").read_text().split():
                (CGROUPS / "cgroup.procs").write_text(left)
            group.rmdir()

    return undo


@dataclass
class SmallDisk:
    """A separate small file system."""

    folder: Path
    megabytes: int
    covered: bool = False
    """Whether a second, read-only mount covers the folder."""

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir(parents=True, exist_ok=True)
        options = f"size={self.megabytes}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "matrix", str(self.folder)], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        subprocess.run(["umount", "-l", str(self.folder)], check=False)

    def fill(self) -> None:
        """Fill the disk."""
        with (self.folder / ".filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def make_read_only(self) -> None:
        """Make the file system read-only, as a kernel does after disk errors."""
        if subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=False, capture_output=True).returncode:
            # Files that are open for writing, such as logs, prevent the remount. A read-only mount covers them instead.
            subprocess.run(["mount", "--bind", str(self.folder), str(self.folder)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(self.folder)], check=True)
            self.covered = True

    def heal(self) -> None:
        """Make the disk writable and free its space, unless it is already unmounted."""
        if not self.folder.is_mount():
            return
        if self.covered:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
            self.covered = False
        subprocess.run(["mount", "-o", "remount,rw", str(self.folder)], check=True)
        (self.folder / ".filler").unlink(missing_ok=True)


@dataclass
class CoordinatorProxy:
    """Proxy between one supervisor and the coordinator. While frozen, it holds all data back."""

    target: Callable[[], int]
    port: int = 0
    _open: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        """Start to listen."""
        self._open.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def freeze(self) -> None:
        """Stop forwarding in both directions."""
        self._open.clear()

    def thaw(self) -> None:
        """Forward again."""
        self._open.set()

    def stop(self) -> None:
        """Close the socket and all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._open.wait()
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.target())
        except (OSError, asyncio.CancelledError):
            writer.close()
            return
        for source, sink in ((reader, upstream_writer), (upstream_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            while data := await source.read(2**16):
                await self._open.wait()
                sink.write(data)
                await sink.drain()
        sink.close()
