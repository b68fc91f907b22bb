"""`finetune logs`: what the pods of a job wrote, also when these are gone."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path

from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import pod_name
from finetune_operator.cli.commands.get import find
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
    job = find(home, key)
    folder = home.job(key)
    per_pod = job.spec.topology.processes_per_node
    made = _attempts(folder, key.name)
    attempt = arguments.attempt or max(made, default=0)
    if attempt == 0:
        raise UsageError(f"job {key.name} has not started a pod yet")
    node_rank = None if arguments.rank is None else arguments.rank // per_pod
    paths = _files(folder, job, attempt, node_rank)
    if not paths:
        known = ", ".join(map(str, sorted(made | {entry.attempt for entry in job.status.attempts})))
        raise UsageError(
            f"job {key.name} has no log of attempt {attempt}, rank {arguments.rank}; its attempts: {known}"
        )
    wanted = line_filter(arguments.rank, per_pod)
    if arguments.follow and holder(folder.lock) is not None:
        asyncio.run(_follow(home, key, attempt, node_rank, wanted))
    else:
        for path in paths:
            Tail(path, wanted).write_new()
    return Exit.SUCCEEDED


def line_filter(rank: int | None, per_pod: int) -> Callable[[str], bool]:
    """Which lines of a pod's log to show: with a rank, its own and those of no rank."""
    if rank is None or per_pod == 1:
        return lambda line: True
    own = f"[rank {rank}]"
    return lambda line: not line.startswith("[rank ") or line.startswith(own)


class Tail:
    """A growing file, written to the terminal by whole lines."""

    def __init__(self, path: Path, wanted: Callable[[str], bool]) -> None:
        self._path = path
        self._wanted = wanted
        self._position = 0
        self._rest = b""

    def write_new(self) -> None:
        """Write what came since the last time."""
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
            if self._wanted(text):
                sys.stdout.write(text + "\n")


async def _follow(home: Home, key: JobKey, first: int, node_rank: int | None, wanted: Callable[[str], bool]) -> None:
    """Write what is there and what comes, of this attempt and later ones, until nobody runs the job any more."""
    folder = home.job(key)
    tails: dict[Path, Tail] = {}
    with FolderWatch(folder.logs) as watch:
        while True:
            # Looked for before the files are read: what a runner wrote before its end is not missed.
            running = holder(folder.lock) is not None
            job = find(home, key)
            for attempt in sorted(_attempts(folder, key.name) | {first}):
                for path in _files(folder, job, attempt, node_rank) if attempt >= first else ():
                    tails.setdefault(path, Tail(path, wanted)).write_new()
            if not running:
                return
            # The runner's end is no change of this folder: look for it now and then.
            await watch.changed(timeout_seconds=1.0)


def _files(folder: JobFolder, job: FineTuneJob, attempt: int, node_rank: int | None) -> list[Path]:
    """The logs of the pods that an attempt has or had, one of a kept pod's earlier attempts included."""
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


def _attempts(folder: JobFolder, name: str) -> set[int]:
    """The attempts that pods were made for."""
    pattern = re.compile(rf"{re.escape(name)}-a(\d+)-n\d+\.log")
    names = [path.name for path in folder.logs.glob("*.log")]
    return {int(match.group(1)) for match in map(pattern.fullmatch, names) if match}
