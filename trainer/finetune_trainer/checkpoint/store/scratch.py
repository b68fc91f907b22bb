"""Local scratch first, shared storage behind: a save is over when it is on this node's own disk.

Each node keeps whole checkpoints on its scratch, where ranks that begin anew in their pods find them. `Drain` copies
them to the storage behind, which alone counts for what survives a machine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.checkpoint.snapshot import Committed
from finetune_trainer.checkpoint.store.base import COPY, CheckpointStore
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.errors import RankError, StorageError

_LOG = logging.getLogger(__name__)

KEEP = 2
"""On scratch: the newest, and the one that is being copied perhaps."""


class ScratchStore(FolderStore):
    """The checkpoints on a node's scratch, with the storage behind it; see `CheckpointStore`.

    Args:
        scratch: the job's folder on this node's own disk.
        behind: the job's storage.
        reads_behind: this rank looks through the storage behind, too; one does.
    """

    def __init__(self, scratch: Path, behind: CheckpointStore, job_uid: str, attempt: int, reads_behind: bool) -> None:
        super().__init__(scratch, job_uid, attempt, Retention(KEEP))
        self._behind = behind
        self._reads_behind = reads_behind
        self.pinned = ""
        """Name of the checkpoint that is being copied: it stays."""

    @property
    def behind(self) -> CheckpointStore:
        """The storage that outlives this machine."""
        return self._behind

    def open(self) -> None:
        """Mark the attempt on both."""
        if self._reads_behind:
            self._behind.open()
        super().open()

    def num_corrupt(self) -> int:
        """Of both."""
        return super().num_corrupt() + (self._behind.num_corrupt() if self._reads_behind else 0)

    def choose(self, warn: Callable[[str], None]) -> Committed | None:
        """The newest of both that verifies; the storage behind is not read where it has nothing newer."""
        found = super().choose(warn)
        step = -1 if found is None else found.manifest.step
        if self._reads_behind and self._behind.newest()[0] > step:
            other = self._behind.choose(warn)
            if other is not None and other.manifest.step > step:
                return other
        return found

    def _remove(self, name: str) -> None:
        if name != self.pinned:
            super()._remove(name)


@dataclass(frozen=True)
class Drained:
    """How a copy ended.

    Attributes:
        committed: the copy, where it came about.
        error: why it did not.
        begun_at: when the state was the loop's, by the loop's clock.
    """

    committed: Committed | None
    error: RankError | None
    begun_at: float


class Drain:
    """Copies the newest checkpoint of a scratch to the storage behind it, one at a time, beside the loop."""

    def __init__(self, store: ScratchStore, on_commit: Callable[[Committed, float], None]) -> None:
        self._store = store
        self._on_commit = on_commit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="drain")
        self._lock = threading.Lock()
        self._waiting: tuple[Committed, float] | None = None
        self._busy = False
        self._idle = threading.Event()
        self._idle.set()
        self._ended: Drained | None = None
        self.current: tuple[int, float] | None = None
        """Step that is being copied, and when it was the loop's."""

    def offer(self, committed: Committed, begun_at: float) -> None:
        """Copy this one next; one that has not been begun by then is passed over."""
        with self._lock:
            self._waiting = (committed, begun_at)
            self._idle.clear()
            if not self._busy:
                self._busy = True
                self._pool.submit(self._work)

    def take_end(self) -> Drained | None:
        """How the last copy ended, once; None where none has ended since."""
        with self._lock:
            ended, self._ended = self._ended, None
        return ended

    def wait(self) -> None:
        """Until nothing is left to copy."""
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
            ended = self._copy(committed, begun_at)
            with self._lock:
                self._ended = ended

    def _copy(self, committed: Committed, begun_at: float) -> Drained:
        try:
            copy = self._store.behind.adopt(committed)
        except RankError as error:
            self._store.behind.discard(committed.manifest.step, COPY)
            return Drained(None, error, begun_at)
        except Exception as error:
            # Somebody waits for this thread.
            _LOG.exception("a checkpoint cannot be copied in a way that nothing expected")
            return Drained(None, StorageError(f"checkpoint storage: {error!r}"), begun_at)
        self._on_commit(copy, begun_at)
        return Drained(copy, None, begun_at)
