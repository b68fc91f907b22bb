"""Saving beside the loop: the loop stands still only until the state is copied, and mostly not even for that."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from finetune_contract.heartbeat import CommittedCheckpoint, RankState
from finetune_contract.interval import DEFAULT_MTBF_SECONDS
from finetune_contract.run_spec import RunSpec
from finetune_trainer.checkpoint.emergency_save import EmergencySave
from finetune_trainer.checkpoint.health import CheckpointHealth
from finetune_trainer.checkpoint.host_copy import HostCopy
from finetune_trainer.checkpoint.interval import SaveClock, due_seconds, save_due
from finetune_trainer.checkpoint.roles import Role, choose_checkpoint, choose_shards, open_storage
from finetune_trainer.checkpoint.save_task import SaveTask, Share, Writer
from finetune_trainer.checkpoint.sharded_state import ShardedState
from finetune_trainer.checkpoint.shards import ShardReader
from finetune_trainer.checkpoint.snapshot import BEST, Committed, Snapshot
from finetune_trainer.checkpoint.split import MIN_PART_BYTES, num_parts, total_bytes
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.checkpoint.store.base import CheckpointStore
from finetune_trainer.checkpoint.store.scratch import Drain, ScratchStore
from finetune_trainer.distributed.channel import Channel
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import FabricError, StaleError, StorageError
from finetune_trainer.report import Reporter

WRITER_NICENESS = 5
"""The writer's thread yields to those that train; not much, for it may hold the interpreter that they wait for."""


@dataclass(frozen=True)
class SaveOptions:
    """What a run, a test or a measurement may want otherwise.

    Attributes:
        best: the best validation so far, {"step", "loss"}.
        clock: monotonic seconds.
        mtbf_seconds: mean time between interruptions, as far as the operator has seen.
        min_part_bytes: smallest part of a checkpoint that a rank of its own writes.
    """

    best: Callable[[], Mapping[str, Any] | None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    mtbf_seconds: float = DEFAULT_MTBF_SECONDS
    min_part_bytes: int = MIN_PART_BYTES


class Checkpointer:
    """The checkpoints of a run, as the loop sees them. Every rank has one, and all call the same methods.

    Args:
        store: the storage, as this rank sees it.
        options: what is seldom given.
    """

    def __init__(
        self,
        spec: RunSpec,
        world: World,
        store: CheckpointStore,
        reporter: Reporter,
        options: SaveOptions | None = None,
    ) -> None:
        self._spec = spec
        self._world = world
        self._store = store
        self._reporter = reporter
        self._options = options or SaveOptions()
        self._clock = self._options.clock
        self._role = Role(world.rank, (0,), own_disk=False)
        self._copy = HostCopy(world.device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer", initializer=_yield_to_training)
        self._writer: Writer | None = None
        self._rescue: EmergencySave | None = None
        self._task: SaveTask | None = None
        self._begun_step = 0
        """Step that was last saved, or is being saved."""
        self._safe_step = 0
        """Step that all ranks know to be committed."""
        self._saved_at = self._clock()
        """When the state of the newest checkpoint was that of the loop."""
        self._cost_seconds: float | None = None
        self._stall_seconds: float | None = None
        self._size_bytes: int | None = None
        self._trouble = CheckpointHealth(spec.max_stale_seconds, reporter)
        self._has_scratch = isinstance(store, ScratchStore)
        self._drain = Drain(store, self._drained) if isinstance(store, ScratchStore) and world.is_first else None

    def restore(self, state: TrainState) -> None:
        """Go on from the newest checkpoint that verifies, if there is one.

        Raises:
            ConfigError: it is of another model than the run specification asks for.
            StorageError: the storage cannot be written or read.
            SupersededError: a newer attempt has begun.
            FabricError: a peer was lost.
        """
        self._role = open_storage(self._store, self._world)
        found: Committed | None = None
        if isinstance(state, ShardedState):
            self._restore_shards(state)
        else:
            found, snapshot = choose_checkpoint(self._store, self._role, self._world, self._reporter.warn)
            if found is not None and not self._has_scratch:
                self._report(found)
            if snapshot is not None:
                state.restore(snapshot)
        if self._role.chooses and (number := self._store.num_corrupt()):
            self._reporter.corrupt_checkpoints(number)
        channel = Channel(self._world) if len(self._role.sharing) > 1 else None
        self._writer = Writer(self._store, self._copy, channel, self._committed, self._last_values)
        self._copy.mark()
        if self._world.size > 1 and not state.is_sharded:
            # Of a sharded state no survivor holds the whole.
            self._rescue = EmergencySave(
                self._world.rank, self._store.behind, self._reporter, self._rescued, self._report
            )
        self._begun_step = self._safe_step = state.step
        self._saved_at = self._clock()
        if self._has_scratch and state.step > 0:
            self._put_behind(state, found)

    def _put_behind(self, state: TrainState, found: Committed | None) -> None:
        """What was on a scratch alone is saved anew, so that the storage has it."""
        is_behind = self._world.is_first and self._store.behind.newest()[0] >= state.step
        if not self._world.share(is_behind):
            self._begun_step = self._safe_step = -1
            self.try_to_save(state)
        elif found is not None and self._world.is_first:
            self._report(found)

    def _restore_shards(self, state: ShardedState) -> None:
        found = choose_shards(self._store, self._role, self._world, self._reporter.warn)
        if found is None:
            return
        if self._world.is_first:
            self._report(found)
        files = [found.folder / entry.name for entry in found.manifest.files]
        state.restore_shards(ShardReader(files), self._store.load_values(found))

    def due(self, step: int) -> bool:
        """Whether the state after this step should be saved. Only rank 0 knows: the clocks of the ranks differ.

        The next save is not due before the last is over.

        Raises:
            StaleError: nothing could be saved for longer than is allowed.
            SupersededError: a newer attempt has begun.
        """
        self._look_at_last()
        if not self._world.is_first:
            return False
        now = self._clock()
        since = now - self._saved_at
        if self._drain is not None and (copied := self._drain.current):
            self._trouble.slow(copied[0], now - copied[1], since)
        if self._task is not None:
            self._trouble.slow(self._task.step, now - self._task.begun_at, since)
            return False
        if self._trouble.text:
            self._trouble.check(since)
            return self._trouble.retry_due(now)
        return save_due(self._spec.checkpoint_interval, self._save_clock(step - self._begun_step, since))

    def _save_clock(self, steps_since: int = 0, seconds_since: float = 0.0) -> SaveClock:
        return SaveClock(steps_since, seconds_since, self._cost_seconds, self._options.mtbf_seconds)

    def _interval_seconds(self) -> float | None:
        """Seconds between two checkpoints, where they are counted in seconds."""
        seconds = due_seconds(self._spec.checkpoint_interval, self._save_clock())
        return round(seconds, 1) if math.isfinite(seconds) else None

    def save(self, state: TrainState) -> None:
        """Begin to save the state, unless that was begun already; `before_update` waits for what must be waited for."""
        began = self._clock()
        if state.step == self._begun_step:
            return
        if self._task is not None and not self._task.future.done() and self._role.own_disk:
            # A slower disk than rank 0's: it saves less often.
            return
        self._wait_for_last()
        self._begun_step = state.step
        if not self._role.writes:
            return
        share = self._share(state)
        if share.part is None:
            return
        assert self._writer is not None
        # Even to name thousands of tensors takes milliseconds: that, too, is done beside the loop.
        task = SaveTask(state.step, lambda: self._snapshot(state), share, began)
        self._task = task
        task.future = self._pool.submit(self._writer.carry_out, task)
        task.stall_seconds = self._clock() - began

    def updated(self) -> None:
        """The state has changed: from here on it may be copied as it is."""
        self._copy.mark()

    def before_update(self) -> None:
        """Wait until the state may change."""
        task = self._task
        if task is not None and not task.copied.is_set():
            began = self._clock()
            task.copied.wait()
            task.stall_seconds += self._clock() - began

    def save_and_wait(self, state: TrainState) -> None:
        """Commit the state, and return on every rank only when it is committed. Tries for as long as is allowed.

        Raises:
            StaleError: nothing could be saved for longer than is allowed.
            SupersededError: a newer attempt has begun.
            FabricError: a peer was lost.
        """
        pause = 1.0
        while not self.try_to_save(state):
            over = self._world.is_first and self._trouble.is_over(self._clock() - self._saved_at + pause)
            # All say why: whoever ends first is taken for the cause.
            if why := self._world.share(self._trouble.sentence() if over else ""):
                raise StaleError(why)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)

    def try_to_save(self, state: TrainState) -> bool:
        """Save the state and wait for it; say on every rank whether it is committed.

        Raises:
            SupersededError: a newer attempt has begun.
            FabricError: a peer was lost.
        """
        if state.step == self._safe_step:
            return True
        self._reporter.state(RankState.SAVING)
        self._finish_last()
        self.save(state)
        self._finish_last()
        if self._drain is not None:
            self._drain.wait()
            self._look_at_drain()
        is_safe = not self._world.is_first or not self._trouble.text
        if all(self._world.gather_numbers(int(is_safe))):
            self._safe_step = state.step
            return True
        self._begun_step = -1
        return False

    def rescue(self, state: TrainState) -> None:
        """A peer is gone, and the loop with it: save the last finished step, if no one has. From any thread; once.

        Never raises: what is lost is no more than without it.
        """
        if self._rescue is not None:
            self._rescue.run(state, self._task)

    def _share(self, state: TrainState) -> Share:
        """What this rank does in a save of this state."""
        rank, sharing = self._role.rank, self._role.sharing
        if self._role.own_disk:
            return Share(0, (rank,), rank)
        if state.is_sharded:
            return Share(rank, sharing, rank)
        if self._size_bytes is None:
            self._size_bytes = total_bytes(state.snapshot({}).tensors)
        writers = sharing[: num_parts(self._size_bytes, len(sharing), self._options.min_part_bytes)]
        return Share(writers.index(rank) if rank in writers else None, writers, rank)

    def _snapshot(self, state: TrainState) -> Snapshot:
        about = {
            "cursor": state.step * self._spec.global_batch,
            "global_batch": self._spec.global_batch,
            "seed": self._spec.training.seed,
            "world_size": self._world.size,
        }
        return state.snapshot(about)

    def _last_values(self) -> dict[str, Any]:
        return {BEST: self._options.best()}

    def _finish_last(self) -> None:
        """Wait on all ranks for the end of the save that is under way."""
        if self._task is not None:
            self._task.written.wait()
        # Behind this no part is missing: the one who commits waits for nobody who may be gone. Not a barrier: on a GPU
        # that would only be queued.
        self._world.gather_numbers(0)
        self._wait_for_last()

    def _rescued(self, state: TrainState) -> Snapshot:
        """The state in the host's memory, whatever the GPU still waits for."""
        snapshot = self._snapshot(state)
        values = {**snapshot.values, **self._last_values()}
        return Snapshot(snapshot.step, self._copy.take_out(snapshot.tensors), values)

    def _wait_for_last(self) -> None:
        if self._task is not None:
            _settle(self._task.future)
            self._look_at_last()

    def _look_at_last(self) -> None:
        """Take in how the last save ended, if it has."""
        self._look_at_drain()
        task = self._task
        if task is None or not task.future.done():
            return
        self._task = None
        error = task.future.exception()
        if error is None:
            if task.share.commits:
                if self._drain is None:
                    self._safe(task.begun_at)
                self._cost_seconds = task.stall_seconds + task.work_seconds
        elif isinstance(error, StorageError | FabricError):
            self._trouble.note(str(error), self._clock())
        else:
            raise error

    def _look_at_drain(self) -> None:
        """Take in how the last copy from scratch to the storage behind it ended, if one has."""
        ended = None if self._drain is None else self._drain.take_end()
        if ended is None:
            return
        if ended.error is None:
            self._safe(ended.begun_at)
        elif isinstance(ended.error, StorageError):
            self._trouble.note(str(ended.error), self._clock())
        else:
            raise ended.error

    def _safe(self, begun_at: float) -> None:
        """What was the loop's state then will outlive this machine."""
        self._trouble.clear()
        self._saved_at = begun_at

    def _committed(self, task: SaveTask, committed: Committed) -> None:
        """Told by the writer's thread. What is on scratch alone is not worth telling."""
        if self._drain is not None:
            self._stall_seconds = task.stall_seconds
            self._drain.offer(committed, task.begun_at)
        elif not self._has_scratch:
            self._report(committed, task.stall_seconds, self._clock() - task.begun_at)

    def _drained(self, committed: Committed, begun_at: float) -> None:
        """Told by the drain's thread."""
        self._report(committed, self._stall_seconds, self._clock() - begun_at)

    def _report(
        self, committed: Committed, stall_seconds: float | None = None, durable_seconds: float | None = None
    ) -> None:
        manifest = committed.manifest
        self._reporter.checkpoint(
            CommittedCheckpoint(
                step=manifest.step,
                time=manifest.time,
                size_bytes=committed.size_bytes,
                attempt=manifest.attempt,
                stall_seconds=stall_seconds,
                durable_seconds=durable_seconds,
                interval_seconds=self._interval_seconds(),
            )
        )


def _settle(future: Future[Any]) -> None:
    """Wait for the end of a save, however it ends."""
    future.exception()


def _yield_to_training() -> None:
    """On Linux each thread has a niceness of its own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
