"""Start, monitor and stop programs without leftovers.

Called by `server`. A `Guard` owns a process group, and every program joins it. The guard kills the group when its
parent exits for any reason, SIGKILL included, because the kernel then closes the pipe that the guard reads.
"""

from __future__ import annotations

import random
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.05
STOP_SECONDS = 10.0
TAIL_LINES = 15
PORTS_BELOW = Path("/proc/sys/net/ipv4/ip_local_port_range")

T = TypeVar("T")


class ControlPlaneError(RuntimeError):
    """The control plane cannot start or has failed."""


def wait_for(what: str, probe: Callable[[], T], seconds: float = 30.0, poll_seconds: float = POLL_SECONDS) -> T:
    """Call `probe` repeatedly until its result is true, and return the result.

    Raises:
        TimeoutError: `seconds` have passed; the message contains `what`.
    """
    deadline = time.monotonic() + seconds
    while not (result := probe()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"timeout after {seconds:g} s: {what}; last result: {result!r}")
        time.sleep(poll_seconds)
    return result


def free_ports(count: int) -> list[int]:
    """Return loopback ports that nothing listens on.

    They are below the range of outgoing connections, so a port stays free while the program that listens on it is
    restarted.
    """
    below = int(PORTS_BELOW.read_text().split()[0]) if PORTS_BELOW.exists() else 32768
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(max(1024, below - 16384), below)
        if port not in ports and _is_free(port):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


class Guard:
    """A process group that does not outlive this process."""

    def __init__(self, folder: Path | None = None) -> None:
        """Create the group.

        folder: of temporary files; it is deleted if this process is killed.
        """
        self._shell = _run_at_exit("kill -KILL 0", process_group=0)
        # Not a member of the group, and delayed until the group's processes have ended and write no more files.
        self._cleaner = _run_at_exit(f"sleep 0.5; rm -rf -- {shlex.quote(str(folder))}") if folder else None

    @property
    def group(self) -> int:
        """The ID of the process group."""
        return self._shell.pid

    def close(self) -> None:
        """Kill all processes of the group. The folder is kept."""
        if self._cleaner is not None:
            self._cleaner.kill()
            self._cleaner.communicate()
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait(STOP_SECONDS)


def _run_at_exit(command: str, process_group: int | None = None) -> subprocess.Popen[bytes]:
    """Start a shell that runs a command when this process exits."""
    return subprocess.Popen(
        ["sh", "-c", f"read -r _; {command}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=process_group,
        start_new_session=process_group is None,
    )


class Program:
    """One program of the control plane: its command, its log and its process."""

    def __init__(self, name: str, command: list[str], log: Path, guard: Guard) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._guard = guard
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the program; its output is appended to the log."""
        assert not self.running
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=self._guard.group,
            )

    def stop(self, with_signal: signal.Signals = signal.SIGKILL) -> None:
        """Stop the program and wait for its exit. SIGKILL is sufficient, because its data is temporary."""
        if self._process is None:
            return
        self._process.send_signal(with_signal)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, for example SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def running(self) -> bool:
        """Return whether the process is running."""
        return self._process is not None and self._process.poll() is None

    @property
    def has_exited(self) -> bool:
        """Return whether the program was started and has exited by itself."""
        return self._process is not None and self._process.poll() is not None

    @property
    def pid(self) -> int | None:
        """The process ID; None if it is not running."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def resident_bytes(self) -> int:
        """Resident memory; 0 if it is not running."""
        if self.pid is None:
            return 0
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) << 10

    def tail(self) -> Iterator[str]:
        """Yield the last lines of the log under a title."""
        yield f"--- {self.name}{' (exited)' if self.has_exited else ''}: {self.log}"
        if self.log.exists():
            yield from self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
