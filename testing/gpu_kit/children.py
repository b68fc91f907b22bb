"""Processes of the kit: each measurement runs in its own process group and is killed at its time limit.

A zygote imports torch and diffusers once and forks the measurements, because each import takes many seconds. If it
cannot, each measurement is started by its command.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testing.gpu_kit.records import Outcome, read_records
from testing.gpu_kit.schedule import Measurement

ZYGOTE = (sys.executable, "-m", "bench.gpu_kit.zygote")
SINGLE = (sys.executable, "-m", "bench.gpu_kit.items")
"""Commands of the zygote, and of one measurement without it; the latter reads its order from its argument."""
_PR_SET_CHILD_SUBREAPER = 36
_END_SECONDS = 3.0
_LOG_TAIL = 400
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Child:
    """A running measurement, which leads its process group."""

    pid: int
    descriptor: int
    """Its pidfd."""
    records: Path
    log: Path
    started: float


class Children:
    """Starts measurements, waits for them and ends them with all their descendants."""

    def __init__(self, folder: Path, tiny: bool, env: Mapping[str, str]) -> None:
        """Adopt orphans of the measurements: without it those that leave their group could not be found.

        Args:
            folder: where records, logs and temporary files are written.
            tiny: whether to use tiny models.
            env: environment of all processes.
        """
        self._folder = folder
        self._tiny = tiny
        self._env = dict(env)
        self._zygote: subprocess.Popen[bytes] | None = None
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    @property
    def has_zygote(self) -> bool:
        """Whether measurements are forked."""
        return self._zygote is not None

    def start_zygote(self, seconds: float) -> str | None:
        """Start the zygote and wait until it has imported the libraries.

        Returns:
            Why it cannot be used; None if it can.
        """
        log = self._folder / "zygote.log"
        with log.open("wb") as output:
            zygote = subprocess.Popen(
                ZYGOTE,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=self._env,
                start_new_session=True,
            )
        self._zygote = zygote
        answer = self._read_answer(seconds)
        if answer is None:
            self.stop_zygote()
            return f"the libraries were not imported: {_tail(log)}"
        return None

    def stop_zygote(self) -> None:
        """End the zygote; later measurements are started by their command."""
        if self._zygote is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._zygote.pid, signal.SIGKILL)
            self._zygote.wait()
            self._zygote = None

    def start(self, measurement: Measurement) -> Child:
        """Start a measurement.

        Raises:
            OSError: no process can be started.
        """
        records = self._folder / "records" / f"{measurement.name}.jsonl"
        log = self._folder / "logs" / f"{measurement.name}.log"
        for path in (records, log):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        order = {
            "function": measurement.function,
            "arguments": dict(measurement.arguments),
            "folder": str(self._folder),
            "tiny": self._tiny,
            "records": str(records),
            "log": str(log),
        }
        started = time.monotonic()
        pid = self._fork(order)
        return Child(pid, os.pidfd_open(pid), records, log, started)

    def wait(self, child: Child, seconds: float) -> Outcome:
        """Wait for the end of a measurement, or kill it at its limit. Return what it has recorded."""
        ready, _, _ = select.select([child.descriptor], [], [], max(0.0, seconds))
        taken = time.monotonic() - child.started
        self.kill(child)
        outcome = read_records(child.records)
        outcome.seconds = taken
        if not ready:
            outcome.error = f"not finished after {taken:.0f} s"
        elif not outcome.done and outcome.error is None:
            outcome.error = f"the process died: {_tail(child.log)}"
        return outcome

    def kill(self, child: Child) -> None:
        """Kill a measurement's group and all its descendants."""
        family = [child.pid, *descendants(child.pid)]
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        for pid in family[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        select.select([child.descriptor], [], [], _END_SECONDS)
        os.close(child.descriptor)

    def kill_orphans(self, kept: Sequence[Child] = ()) -> None:
        """Kill what ended measurements have left behind: children of theirs that started a session of their own.

        Args:
            kept: measurements that still run.
        """
        spared = {child.pid for child in kept} | ({self._zygote.pid} if self._zygote else set())
        spared |= {pid for child in kept for pid in descendants(child.pid)}
        deadline = time.monotonic() + _END_SECONDS
        while orphans := [pid for pid in descendants(os.getpid()) if pid not in spared]:
            for pid in orphans:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)

    def _fork(self, order: dict[str, Any]) -> int:
        if self._zygote is not None:
            assert self._zygote.stdin is not None
            with suppress(OSError):
                self._zygote.stdin.write(json.dumps(order).encode() + b"\n")
                self._zygote.stdin.flush()
                answer = self._read_answer(_END_SECONDS)
                if answer is not None:
                    return int(answer["pid"])
            self.stop_zygote()
        started = subprocess.Popen(
            [*SINGLE, json.dumps(order)], stdin=subprocess.DEVNULL, env=self._env, start_new_session=True
        )
        # Reaped as an orphan; its records tell how it ended.
        started.returncode = 0
        return started.pid

    def _read_answer(self, seconds: float) -> dict[str, Any] | None:
        assert self._zygote is not None
        assert self._zygote.stdout is not None
        ready, _, _ = select.select([self._zygote.stdout], [], [], seconds)
        line = self._zygote.stdout.readline() if ready else b""
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer


def descendants(pid: int) -> list[int]:
    """Return the pids of all descendants of a process."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with suppress(OSError):
                stat = (path / "stat").read_bytes()
                parent = int(stat[stat.rindex(b")") + 2 :].split()[1])
                children.setdefault(parent, []).append(int(path.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _tail(log: Path) -> str:
    """Return the end of a log in one line."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return " ".join(text.split())[-_LOG_TAIL:] or "it wrote nothing"
