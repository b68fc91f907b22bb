"""Checkpoints on a node's scratch disk, copied to the durable storage in the background.

A save ends when the checkpoint is on this node's own disk. Each node keeps complete checkpoints on its scratch, where
ranks that restart in their pods find them. `Drain` copies them to the durable storage. Only a copy there survives the
loss of the machine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.checkpoint.snapshot import Committed
from finetune_trainer.checkpoint.store.base import IMPORT_WRITER, CheckpointStore
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.errors import RankError, StorageError

_LOG = logging.getLogger(__name__)

KEEP = 2
"""Checkpoints on scratch: the newest, and one that may be being copied."""


class ScratchStore(FolderStore):
    """The checkpoints on a node's scratch, in front of a durable storage; see `CheckpointStore`.

    Args:
        scratch: the job's folder on this node's own disk.
        durable: the job's storage.
        job_uid: see `CheckpointStore`.
        attempt: see `CheckpointStore`.
        reads_durable: whether this rank also searches the durable storage; one rank does.
    """

    def __init__(
        self, scratch: Path, durable: CheckpointStore, job_uid: str, attempt: int, reads_durable: bool
    ) -> None:
        super().__init__(scratch, job_uid, attempt, Retention(KEEP))
        self._durable = durable
        self._reads_durable = reads_durable
        self.pinned = ""
        """Name of the checkpoint that is being copied: it is not removed."""

    @property
    def durable(self) -> CheckpointStore:
        """Return the storage that survives the loss of this machine."""
        return self._durable

    def open(self) -> None:
        """Mark the attempt on both storages."""
        if self._reads_durable:
            self._durable.open()
        super().open()

    def num_corrupt(self) -> int:
        """Return the number of both storages."""
        return super().num_corrupt() + (self._durable.num_corrupt() if self._reads_durable else 0)

    def choose(self, warn: Callable[[str], None]) -> Committed | None:
        """Return the newest valid checkpoint of both; the durable storage is read only if it has a newer one."""
        found = super().choose(warn)
        step = -1 if found is None else found.manifest.step
        if self._reads_durable and self._durable.newest()[0] > step:
            other = self._durable.choose(warn)
            if other is not None and other.manifest.step > step:
                return other
        return found

    def _remove(self, name: str) -> None:
        if name != self.pinned:
            super()._remove(name)


@dataclass(frozen=True)
class DrainResult:
    """The result of a copy.

    Attributes:
        committed: the copy; None after an error.
        error: why the copy failed; None after success.
        begun_at: when the state was the loop's state, in seconds of the loop's clock.
    """

    committed: Committed | None
    error: RankError | None
    begun_at: float


class Drain:
    """Copies the newest checkpoint of a scratch to the durable storage, one at a time, in a background thread."""

    def __init__(self, store: ScratchStore, on_commit: Callable[[Committed, float], None]) -> None:
        self._store = store
        self._on_commit = on_commit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="drain")
        self._lock = threading.Lock()
        self._waiting: tuple[Committed, float] | None = None
        self._busy = False
        self._idle = threading.Event()
        self._idle.set()
        self._result: DrainResult | None = None
        self.current: tuple[int, float] | None = None
        """Step that is being copied, and when its state was the loop's state."""

    def offer(self, committed: Committed, begun_at: float) -> None:
        """Copy this checkpoint next. It replaces an older one whose copy has not started."""
        with self._lock:
            self._waiting = (committed, begun_at)
            self._idle.clear()
            if not self._busy:
                self._busy = True
                self._pool.submit(self._work)

    def take_result(self) -> DrainResult | None:
        """Return the result of the last copy, once; None if no copy has ended since the last call."""
        with self._lock:
            result, self._result = self._result, None
        return result

    def wait(self) -> None:
        """Wait until nothing is left to copy."""
        self._idle.wait()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._store.pinned, self.current = "", None
                if self._waiting is None:
                    self._busy = False
                    self._idle.set()
                    return
                (committed, begun_at), self._waiting = self._waiting, None
                self._store.pinned = committed.folder.name
                self.current = (committed.manifest.step, begun_at)
            result = self._copy(committed, begun_at)
            with self._lock:
                self._result = result

    def _copy(self, committed: Committed, begun_at: float) -> DrainResult:
        try:
            copy = self._store.durable.import_checkpoint(committed)
        except RankError as error:
            self._store.durable.discard(committed.manifest.step, IMPORT_WRITER)
            return DrainResult(None, error, begun_at)
        except Exception as error:
            # The loop may wait for this thread, so every error becomes a result.
            _LOG.exception("unexpected error while copying a checkpoint")
            return DrainResult(None, StorageError(f"checkpoint storage: {error!r}"), begun_at)
        self._on_commit(copy, begun_at)
        return DrainResult(copy, None, begun_at)
