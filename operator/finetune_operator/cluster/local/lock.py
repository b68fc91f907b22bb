"""One `finetune run` for each job: an flock that the kernel lets go of when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_operator.cluster.local.kubelet.processes import ProcessId, identify, is_alive


class LockedError(Exception):
    """Another process holds the lock; `holder` is known unless it has only just taken it."""

    def __init__(self, holder: ProcessId | None) -> None:
        super().__init__(f"held by process {holder.pid}" if holder else "held by another process")
        self.holder = holder


@contextmanager
def hold(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock for a while. The descriptor is not inherited: a pod that outlives us does not keep it.

    Args:
        path: the lock file; it is made, and stays.
        wait: wait for another holder's end instead of raising.

    Raises:
        LockedError: another process holds it.
    """
    descriptor = _open_locked(path, wait)
    try:
        me = identify(os.getpid())
        assert me is not None
        os.pwrite(descriptor, json.dumps(me.to_json()).encode(), 0)
        yield
    finally:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def holder(path: Path) -> ProcessId | None:
    """The living process that holds a lock; None where nobody does."""
    try:
        process = ProcessId.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return process if is_alive(process) else None


def _open_locked(path: Path, wait: bool) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise LockedError(holder(path)) from error
        # Whoever deleted the job held the lock of a file that is gone.
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
