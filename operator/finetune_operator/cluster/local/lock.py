"""Allows one `finetune run` per job: an flock, which the kernel releases whenever its holder exits."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_operator.cluster.local.kubelet.processes import ProcessId, identify, is_alive


class LockedError(Exception):
    """Another process holds the lock. `holder` is None if that process has not yet written its identity."""

    def __init__(self, holder: ProcessId | None) -> None:
        super().__init__(f"held by process {holder.pid}" if holder else "held by another process")
        self.holder = holder


@contextmanager
def hold(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock inside the block. Pods do not inherit the descriptor, so a pod never keeps the lock.

    Args:
        path: the lock file. It is created if missing, and not deleted.
        wait: wait until another holder releases the lock instead of raising.

    Raises:
        LockedError: another process holds it.
    """
    descriptor = _open_locked(path, wait)
    try:
        own = identify(os.getpid())
        assert own is not None
        os.pwrite(descriptor, json.dumps(own.to_json()).encode(), 0)
        yield
    finally:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def holder(path: Path) -> ProcessId | None:
    """Return the running process that holds a lock; None if no process does."""
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
        # The previous holder deleted the job, and this descriptor belongs to the deleted lock file.
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
