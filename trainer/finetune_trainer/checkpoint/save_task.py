"""One save, carried out by the writer's thread while the loop trains on."""

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
class Share:
    """This rank's share of a save.

    Attributes:
        part: number of the part that it writes, or None.
        writers: ranks that write the parts, in their order; the first commits. One writer commits alone.
        rank: this rank.
    """

    part: int | None
    writers: tuple[int, ...]
    rank: int

    @property
    def commits(self) -> bool:
        """Whether this rank commits what was written."""
        return self.part == 0


@dataclass
class SaveTask:
    """A save that is under way, as the loop's thread and the writer's both see it.

    Attributes:
        step: step whose state it saves.
        take: names the live state; its tensors may be read until `copied` is set.
        copied: the copy is made: the state may change.
        written: this rank's part is durable, or has failed.
        abandoned: nobody waits for the other parts any more.
        stall_seconds: for how long the loop has stood still for it.
        work_seconds: what the writer's thread computed for it.
    """

    step: int
    take: Callable[[], Snapshot]
    share: Share
    begun_at: float
    copied: threading.Event = field(default_factory=threading.Event)
    written: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    stall_seconds: float = 0.0
    work_seconds: float = 0.0
    future: Future[Committed | None] = field(default_factory=Future)


class Writer:
    """What the writer's thread needs to carry a save out.

    Args:
        on_commit: told of what was committed.
        last_values: values of state.json that must be read from somewhere; the loop is not to wait for them.
    """

    def __init__(
        self,
        store: CheckpointStore,
        copy: HostCopy,
        channel: Channel | None,
        on_commit: Callable[[SaveTask, Committed], None],
        last_values: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._store = store
        self._copy = copy
        self._channel = channel
        self._on_commit = on_commit
        self._last_values = last_values

    def carry_out(self, task: SaveTask) -> Committed | None:
        """Copy, write, and commit where this rank does.

        Raises:
            RankError: it could not be saved; where another rank commits, that one is told instead.
        """
        began = time.thread_time()
        try:
            committed = self._carry_out(task)
        except RankError:
            if task.share.commits:
                # A full disk must not be filled by what is half there.
                self._store.discard(task.step)
            raise
        finally:
            task.copied.set()
            task.written.set()
            task.work_seconds = time.thread_time() - began
        if committed is not None:
            self._on_commit(task, committed)
        return committed

    def _carry_out(self, task: SaveTask) -> Committed | None:
        share = task.share
        parts = len(share.writers)
        assert share.part is not None
        self._store.on_stage(SaveStage.COPY)
        snapshot = task.take()
        # Of shards each rank has no others than its own.
        part = snapshot.tensors if snapshot.offsets else take_part(snapshot.tensors, share.part, parts)
        mine = Snapshot(task.step, self._copy.copy(part), snapshot.values, snapshot.offsets)
        task.copied.set()
        if share.commits:
            files = self._store.write_part(mine, 0, parts)
            task.written.set()
            words = [self._hear(task, rank) for rank in share.writers[1:]]
            files += tuple(
                entry for rank, word in zip(share.writers[1:], words, strict=True) for entry in _files(rank, word)
            )
            values = {**snapshot.values, **self._last_values()}
            return self._store.commit(Snapshot(task.step, {}, values), files, time.time())
        assert self._channel is not None
        try:
            files = self._store.write_part(mine, share.part, parts)
        except RankError as error:
            self._channel.tell(_key(task, share.rank), json.dumps(str(error)))
        else:
            self._channel.tell(_key(task, share.rank), _FILES.dump_json(files).decode())
        return None

    def _hear(self, task: SaveTask, rank: int) -> str:
        """What another rank says of its part."""
        assert self._channel is not None
        return self._channel.hear(_key(task, rank), lambda: not task.abandoned.is_set())


def _files(rank: int, word: str) -> tuple[FileEntry, ...]:
    try:
        return _FILES.validate_json(word)
    except ValidationError:
        raise StorageError(f"rank {rank}: {json.loads(word)}") from None


def _key(task: SaveTask, rank: int) -> str:
    return f"save/{task.step}/{rank}"
