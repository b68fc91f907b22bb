"""One save: the writer's thread runs it while the loop continues to train."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from finetune_contract.manifest import FileEntry
from finetune_trainer.checkpoint.host_copy import HostCopy
from finetune_trainer.checkpoint.snapshot import Committed, Snapshot
from finetune_trainer.checkpoint.split import take_part
from finetune_trainer.checkpoint.store.base import CheckpointStore
from finetune_trainer.checkpoint.store.stages import SaveStage
from finetune_trainer.distributed.channel import Channel
from finetune_trainer.errors import RankError, StorageError

_FILES = TypeAdapter(tuple[FileEntry, ...])


@dataclass(frozen=True)
class SavePart:
    """The part of a checkpoint that this rank writes.

    Attributes:
        index: index of the part, from 0; None if this rank writes none.
        writers: ranks that write the parts, in order; the first one commits. A single writer commits alone.
        rank: this rank.
    """

    index: int | None
    writers: tuple[int, ...]
    rank: int

    @property
    def commits(self) -> bool:
        """Return whether this rank commits the checkpoint."""
        return self.index == 0


@dataclass
class SaveTask:
    """A running save, shared by the loop's thread and the writer's thread.

    Attributes:
        step: step whose state is saved.
        take_snapshot: returns the live state; its tensors may be read until `copied` is set.
        part: the part that this rank writes.
        begun_at: when the save was requested, in seconds of the loop's clock.
        copied: set when the copy is complete: the state may change.
        written: set when this rank's part is durable, or has failed.
        abandoned: set when the committing rank must not wait for the other parts.
        stall_seconds: how long the loop has waited for this save.
        work_seconds: CPU time of the writer's thread for this save.
        future: the result of the writer's thread.
    """

    step: int
    take_snapshot: Callable[[], Snapshot]
    part: SavePart
    begun_at: float
    copied: threading.Event = field(default_factory=threading.Event)
    written: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    stall_seconds: float = 0.0
    work_seconds: float = 0.0
    future: Future[Committed | None] = field(default_factory=Future)


class CheckpointWriter:
    """Runs saves in the writer's thread.

    Args:
        store: where this rank writes.
        copy: this rank's buffers.
        channel: carries the results of the other ranks' parts; None if this rank writes alone.
        on_commit: called with each committed checkpoint.
        late_values: returns values of state.json that are read from a file, so that the loop does not wait for them.
    """

    def __init__(
        self,
        store: CheckpointStore,
        copy: HostCopy,
        channel: Channel | None,
        on_commit: Callable[[SaveTask, Committed], None],
        late_values: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._store = store
        self._copy = copy
        self._channel = channel
        self._on_commit = on_commit
        self._late_values = late_values

    def run(self, task: SaveTask) -> Committed | None:
        """Copy, write, and commit if this rank is the one that commits.

        Raises:
            RankError: the save failed. A rank that does not commit sends its error to the committing rank instead.
        """
        began = time.thread_time()
        try:
            committed = self._run(task)
        except RankError:
            if task.part.commits:
                # An incomplete checkpoint must not keep a full disk full.
                self._store.discard(task.step)
            raise
        finally:
            task.copied.set()
            task.written.set()
            task.work_seconds = time.thread_time() - began
        if committed is not None:
            self._on_commit(task, committed)
        return committed

    def _run(self, task: SaveTask) -> Committed | None:
        part = task.part
        num_parts = len(part.writers)
        assert part.index is not None
        self._store.on_stage(SaveStage.COPY)
        snapshot = task.take_snapshot()
        # A sharded rank holds its own shards only.
        tensors = snapshot.tensors if snapshot.offsets else take_part(snapshot.tensors, part.index, num_parts)
        mine = Snapshot(task.step, self._copy.copy(tensors), snapshot.values, snapshot.offsets)
        task.copied.set()
        if part.commits:
            files = self._store.write_part(mine, 0, num_parts)
            task.written.set()
            results = [self._receive_result(task, rank) for rank in part.writers[1:]]
            files += tuple(
                entry for rank, result in zip(part.writers[1:], results, strict=True) for entry in _files(rank, result)
            )
            values = {**snapshot.values, **self._late_values()}
            return self._store.commit(Snapshot(task.step, {}, values), files, time.time())
        assert self._channel is not None
        self._write_and_send(mine, task, num_parts)
        return None

    def _write_and_send(self, mine: Snapshot, task: SaveTask, num_parts: int) -> None:
        """Write this rank's part, and send its files, or its error, to the committing rank."""
        part = task.part
        assert self._channel is not None
        assert part.index is not None
        try:
            files = self._store.write_part(mine, part.index, num_parts)
        except RankError as error:
            self._channel.send(_key(task, part.rank), json.dumps(str(error)))
        else:
            self._channel.send(_key(task, part.rank), _FILES.dump_json(files).decode())

    def _receive_result(self, task: SaveTask, rank: int) -> str:
        """Return another rank's files, or its error, as JSON."""
        assert self._channel is not None
        return self._channel.receive(_key(task, rank), lambda: not task.abandoned.is_set())


def _files(rank: int, result: str) -> tuple[FileEntry, ...]:
    """Return the files of another rank's part.

    Raises:
        StorageError: the rank reported an error.
    """
    try:
        return _FILES.validate_json(result)
    except ValidationError:
        raise StorageError(f"rank {rank}: {json.loads(result)}") from None


def _key(task: SaveTask, rank: int) -> str:
    return f"save/{task.step}/{rank}"
