"""`finetune logs`: shows the output of a job's pods, including deleted pods."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path

from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import pod_name
from finetune_operator.cli.commands.get import find_job
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cluster.local.home import Home, JobFolder
from finetune_operator.cluster.local.inotify import FolderWatch
from finetune_operator.cluster.local.lock import holder
from finetune_operator.cluster.protocol import JobKey

CHUNK_BYTES = 64 * 1024


def logs(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune logs`."""
    home = Home(arguments.home)
    key = JobKey(arguments.namespace, arguments.name)
    job = find_job(home, key)
    folder = home.job(key)
    per_pod = job.spec.topology.processes_per_node
    started = _find_attempts(folder, key.name)
    attempt = arguments.attempt or max(started, default=0)
    if attempt == 0:
        raise UsageError(f"job {key.name} has not started a pod yet")
    node_rank = None if arguments.rank is None else arguments.rank // per_pod
    paths = _find_files(folder, job, attempt, node_rank)
    if not paths:
        attempts = ", ".join(map(str, sorted(started | {entry.attempt for entry in job.status.attempts})))
        whose = f"attempt {attempt}" if arguments.rank is None else f"attempt {attempt}, rank {arguments.rank}"
        raise UsageError(f"job {key.name} has no log of {whose}; its attempts: {attempts}")
    is_shown = make_line_filter(arguments.rank, per_pod)
    if arguments.follow and holder(folder.lock) is not None:
        asyncio.run(_follow(home, key, attempt, node_rank, is_shown))
    else:
        for path in paths:
            Tail(path, is_shown).write_new()
    return Exit.SUCCEEDED


def make_line_filter(rank: int | None, per_pod: int) -> Callable[[str], bool]:
    """Return a function that selects the lines to show: with a rank, its own lines and those of no rank."""
    if rank is None or per_pod == 1:
        return lambda line: True
    own = f"[rank {rank}]"
    return lambda line: not line.startswith("[rank ") or line.startswith(own)


class Tail:
    """Copies a growing file to the terminal in complete lines."""

    def __init__(self, path: Path, is_shown: Callable[[str], bool]) -> None:
        self._path = path
        self._is_shown = is_shown
        self._position = 0
        self._rest = b""

    def write_new(self) -> None:
        """Write the lines that were added since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                while chunk := file.read(CHUNK_BYTES):
                    self._position += len(chunk)
                    *lines, self._rest = (self._rest + chunk).split(b"\n")
                    self._write(lines)
        except FileNotFoundError:
            return
        sys.stdout.flush()

    def _write(self, lines: list[bytes]) -> None:
        for line in lines:
            text = line.decode(errors="replace")
            if self._is_shown(text):
                sys.stdout.write(text + "\n")


async def _follow(home: Home, key: JobKey, first: int, node_rank: int | None, is_shown: Callable[[str], bool]) -> None:
    """Write existing and new lines of this attempt and later ones, until no process runs the job."""
    folder = home.job(key)
    tails: dict[Path, Tail] = {}
    with FolderWatch(folder.logs) as watch:
        while True:
            # Check before reading the files, so that the last lines before the runner's exit are not missed.
            running = holder(folder.lock) is not None
            job = find_job(home, key)
            for attempt in sorted(_find_attempts(folder, key.name) | {first}):
                for path in _find_files(folder, job, attempt, node_rank) if attempt >= first else ():
                    tails.setdefault(path, Tail(path, is_shown)).write_new()
            if not running:
                return
            # The runner's exit does not change this folder, so check for it periodically.
            await watch.wait_for_change(timeout_seconds=1.0)


def _find_files(folder: JobFolder, job: FineTuneJob, attempt: int, node_rank: int | None) -> list[Path]:
    """Return the logs of an attempt's pods. A kept pod's log is named after the attempt that created the pod."""
    name = job.metadata.name
    entry = next((entry for entry in job.status.attempts if entry.attempt == attempt), None)
    if entry is not None and entry.pod_attempts:
        numbers = entry.pod_ranks or range(len(entry.pod_attempts))
        members = enumerate(zip(entry.pod_attempts, numbers, strict=True))
        paths = {rank: folder.logs / f"{pod_name(name, *member)}.log" for rank, member in members}
    else:
        found = folder.logs.glob(f"{name}-a{attempt}-n*.log")
        paths = {_node_rank(path): path for path in sorted(found, key=_node_rank)}
    return [path for rank, path in paths.items() if path.exists() and node_rank in (None, rank)]


def _node_rank(path: Path) -> int:
    return int(path.stem.rpartition("-n")[2])


def _find_attempts(folder: JobFolder, name: str) -> set[int]:
    """Return the attempts for which pods were created."""
    pattern = re.compile(rf"{re.escape(name)}-a(\d+)-n\d+\.log")
    names = [path.name for path in folder.logs.glob("*.log")]
    return {int(match.group(1)) for match in map(pattern.fullmatch, names) if match}
