"""Start programs, watch over them and end them without leftovers.

Called by `server`. A `Guard` owns a process group; every program joins it. The guard ends the group when its parent
ends in any way, SIGKILL included, because the kernel then closes the pipe that the guard reads.
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
    """The control plane did not do what was asked of it."""


def wait_for(what: str, probe: Callable[[], T], seconds: float = 30.0, poll_seconds: float = POLL_SECONDS) -> T:
    """Call `probe`, with a pause between two calls, until what it returns is true, and return that.

    Raises TimeoutError, which names `what`, after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not (result := probe()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still waiting after {seconds:g} s: {what}; last seen: {result!r}")
        time.sleep(poll_seconds)
    return result


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nothing listens on.

    They lie below the range that the kernel takes for outgoing connections, so that one stays free while the program
    that listens on it is stopped and started again.
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
        """Begin one.

        folder: of temporary files, which do not outlive a process that is killed either.
        """
        self._shell = _at_the_end("kill -KILL 0", process_group=0)
        # Not one of the group, and a moment later: whoever writes there is gone by then.
        self._broom = _at_the_end(f"sleep 0.5; rm -rf -- {shlex.quote(str(folder))}") if folder else None

    @property
    def group(self) -> int:
        """The group's number."""
        return self._shell.pid

    def close(self) -> None:
        """End all that is in the group, at once. The folder stays."""
        if self._broom is not None:
            self._broom.kill()
            self._broom.communicate()
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait(STOP_SECONDS)


def _at_the_end(command: str, process_group: int | None = None) -> subprocess.Popen[bytes]:
    """A shell that runs a command when this process ends."""
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
        """Start it; its output is appended to the log."""
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
        """End it and wait until it is gone. What it has to say goodbye to is thrown away, so SIGKILL will do."""
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
        """Send it a signal, for example SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def died(self) -> bool:
        """Whether it was started and ended by itself."""
        return self._process is not None and self._process.poll() is not None

    @property
    def pid(self) -> int | None:
        """Its process' number, where it runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def resident_bytes(self) -> int:
        """Memory that it has in RAM; zero where it does not run."""
        if self.pid is None:
            return 0
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) << 10

    def tail(self) -> Iterator[str]:
        """Last lines of its log under a title."""
        yield f"--- {self.name}{' (it ended)' if self.died else ''}: {self.log}"
        if self.log.exists():
            yield from self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
