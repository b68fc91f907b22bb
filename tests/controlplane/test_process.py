"""Programs end together with the process that started them, even if it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testing.controlplane.process import Guard, Program, free_ports, wait_for

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import sys, time
from pathlib import Path
from testing.controlplane.process import Guard, Program
folder = Path(sys.argv[1])
program = Program("sleep", ["sleep", "600"], folder / "log", Guard(folder))
program.start()
print(program.pid, flush=True)
time.sleep(600)
"""


def exists(pid: int) -> bool:
    """Return whether a process is running; a zombie is not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_program_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-c", PARENT, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert exists(pid)
        os.kill(parent.pid, signal.SIGKILL)
    wait_for("the program has ended", lambda: not exists(pid), seconds=10)
    wait_for("its files are deleted", lambda: not folder.exists(), seconds=10)


def test_program_that_exits_is_detected_and_its_log_is_available(tmp_path: Path) -> None:
    guard = Guard()
    program = Program("short", ["sh", "-c", "echo no such file; exit 3"], tmp_path / "log", guard)
    program.start()
    wait_for("it exits", lambda: program.has_exited, seconds=10)
    assert list(program.tail())[1:] == ["no such file"]
    program.stop()
    guard.close()


def test_ports_are_free_and_outside_the_range_of_outgoing_connections() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < lowest_outgoing


def test_timeout_message_names_the_condition() -> None:
    with pytest.raises(TimeoutError, match="pigs fly"):
        wait_for("pigs fly", lambda: False, seconds=0)
