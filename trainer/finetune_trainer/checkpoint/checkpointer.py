"""Saves checkpoints in the background: the loop waits at most until the state is copied to host memory.

The training loop calls it on every rank. The writer's thread copies, writes and commits.
"""

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
from finetune_trainer.checkpoint.roles import (
    OPENING,
    READING,
    EarlierCheckpoint,
    Role,
    choose_checkpoint,
    choose_shards,
    open_storage,
    read_shards,
    start_from,
)
from finetune_trainer.checkpoint.save_task import CheckpointWriter, SavePart, SaveTask
from finetune_trainer.checkpoint.sharded_state import ShardedState
from finetune_trainer.checkpoint.snapshot import BEST, Committed, Snapshot
from finetune_trainer.checkpoint.split import MIN_PART_BYTES, num_parts, total_bytes
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.checkpoint.store.base import CheckpointStore
from finetune_trainer.checkpoint.store.scratch import Drain, ScratchStore
from finetune_trainer.distributed.channel import Channel
from finetune_trainer.distributed.cpus import use_helper_cpus
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import FabricError, StaleError, StorageError
from finetune_trainer.patience import wait_out
from finetune_trainer.pauses import Pause, pause_together, sleep
from finetune_trainer.report import Reporter

WRITER_NICENESS = 5
"""Niceness of the writer's thread, so that training comes first.

It is low because the writer may hold the interpreter lock that training waits for.
"""


@dataclass(frozen=True)
class SaveOptions:
    """Options of a Checkpointer that a run, a test or a bench may override.

    Attributes:
        best: returns the best validation so far, {"step", "loss"}.
        clock: monotonic time in seconds.
        pause: waits between two tries of a save that the run cannot do without.
        mtbf_seconds: mean time between interruptions, as observed by the operator.
        min_part_bytes: minimum size of the part of a checkpoint that one rank writes.
        about: returns further values to save: what the run trains, and on what.
        check: receives these values of the checkpoint that is restored; raises if the run must not continue from it.
        earlier: checkpoint of another job to start from; None to start at the first step.
    """

    best: Callable[[], Mapping[str, Any] | None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    pause: Pause = sleep
    mtbf_seconds: float = DEFAULT_MTBF_SECONDS
    min_part_bytes: int = MIN_PART_BYTES
    about: Callable[[], Mapping[str, Any]] = dict
    check: Callable[[Mapping[str, Any]], None] = lambda values: None
    earlier: EarlierCheckpoint | None = None


class Checkpointer:
    """The loop's interface to checkpoints. Every rank has one, and all ranks call the same methods.

    Args:
        store: the storage, as this rank sees it.
        options: overrides of the defaults.
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
        self._writer: CheckpointWriter | None = None
        self._emergency_save: EmergencySave | None = None
        self._task: SaveTask | None = None
        self._begun_step = 0
        """Step of the newest save, finished or running."""
        self._safe_step = 0
        """Newest step that is committed as far as all ranks know."""
        self._saved_at = self._clock()
        """Time at which the newest checkpoint's state was the loop's state."""
        self._cost_seconds: float | None = None
        self._stall_seconds: float | None = None
        self._size_bytes: int | None = None
        self._health = CheckpointHealth(spec.max_stale_seconds, reporter)
        self._has_scratch = isinstance(store, ScratchStore)
        self._drain = Drain(store, self._report_drained) if isinstance(store, ScratchStore) and world.is_first else None

    def check_storage(self) -> None:
        """Write and remove a small file on rank 0, so that storage without write access is found before the map phase.

        Raises:
            StorageError: the storage cannot be written.
        """
        if self._world.is_first:
            durable = self._store.durable
            durable.remove_probe(wait_out(OPENING, durable.put_probe))

    def restore(self, state: TrainState) -> None:
        """Restore the newest valid checkpoint into the state, if one exists. All ranks call it.

        Raises:
            ConfigError: the checkpoint holds other weights than the run specification defines.
            StorageError: the storage cannot be written or read.
            SupersededError: a newer attempt has begun.
            FabricError: a peer was lost.
        """
        self._role = open_storage(self._store, self._world)
        found: Committed | None = None
        if isinstance(state, ShardedState):
            is_restored = self._restore_shards(state)
        else:
            found, is_restored = self._restore_replica(state)
        if self._role.chooses and (number := self._store.num_corrupt()):
            self._reporter.corrupt_checkpoints(number)
        self._prepare_saves(state)
        self._begun_step = self._safe_step = state.step
        self._saved_at = self._clock()
        if not is_restored and self._options.earlier is not None:
            start_from(self._options.earlier, state, self._store, self._world)
            # A copy of its own, because the other job may be deleted.
            self._copy.mark_changed()
            self._begun_step = self._safe_step = -1
            self.try_to_save(state)
            self._options.earlier.release()
        elif self._has_scratch and state.step > 0:
            self._make_durable(state, found)

    def _restore_replica(self, state: TrainState) -> tuple[Committed | None, bool]:
        """Restore a replicated state.

        Returns:
            The checkpoint on the rank that read it, and whether there is one.
        """
        found, snapshot = choose_checkpoint(self._store, self._role, self._world, self._reporter.warn)
        if found is not None and not self._has_scratch:
            self._report(found)
        if snapshot is not None:
            self._options.check(snapshot.values)
            state.restore(snapshot)
        return found, snapshot is not None

    def _prepare_saves(self, state: TrainState) -> None:
        """Create the writer and, unless the state is sharded, the emergency save."""
        channel = Channel(self._world) if len(self._role.sharing) > 1 else None
        self._writer = CheckpointWriter(self._store, self._copy, channel, self._report_committed, self._late_values)
        self._copy.mark_changed()
        if not state.is_sharded:
            # No survivor holds a complete sharded state.
            self._emergency_save = EmergencySave(
                self._world.rank, self._store.durable, self._reporter, self._host_snapshot, self._report
            )

    def _make_durable(self, state: TrainState, found: Committed | None) -> None:
        """Save again what was restored from a scratch alone, so that the durable storage has it."""
        is_durable = self._world.is_first and self._store.durable.newest()[0] >= state.step
        if not self._world.share(is_durable):
            self._begun_step = self._safe_step = -1
            self.try_to_save(state)
        elif found is not None and self._world.is_first:
            self._report(found)

    def _restore_shards(self, state: ShardedState) -> bool:
        """Restore a sharded state; return whether there is a checkpoint."""
        found = choose_shards(self._store, self._role, self._world, self._reporter.warn)
        if found is None:
            return False
        if self._world.is_first:
            self._report(found)
        shards, values = read_shards(found, self._store, READING)
        self._options.check(values)
        state.restore_shards(shards, values)
        return True

    def due(self, step: int) -> bool:
        """Return whether to save the state after this step. Only rank 0 decides, because the ranks' clocks differ.

        No save is due while another one runs.

        Raises:
            StaleError: the newest checkpoint is older than the run allows.
            SupersededError: a newer attempt has begun.
        """
        self._collect_last()
        if not self._world.is_first:
            return False
        now = self._clock()
        since = now - self._saved_at
        if self._drain is not None and (copied := self._drain.current):
            self._health.check_running_save(copied[0], now - copied[1], since)
        if self._task is not None:
            self._health.check_running_save(self._task.step, now - self._task.begun_at, since)
            return False
        if self._health.error:
            self._health.check(since)
            return self._health.retry_due(now)
        return save_due(self._spec.checkpoint_interval, self._save_clock(step - self._begun_step, since))

    def _save_clock(self, steps_since: int = 0, seconds_since: float = 0.0) -> SaveClock:
        return SaveClock(steps_since, seconds_since, self._cost_seconds, self._options.mtbf_seconds)

    def _interval_seconds(self) -> float | None:
        """Return the seconds between two checkpoints; None if the interval counts steps only."""
        seconds = due_seconds(self._spec.checkpoint_interval, self._save_clock())
        return round(seconds, 1) if math.isfinite(seconds) else None

    def save(self, state: TrainState) -> None:
        """Start to save the state, unless a save of this step has started. `before_update` waits for its copy."""
        began = self._clock()
        if state.step == self._begun_step:
            return
        if self._task is not None and not self._task.future.done() and self._role.own_disk:
            # This node's disk is slower than rank 0's: it saves less often.
            return
        self._wait_for_last()
        self._begun_step = state.step
        if not self._role.writes:
            return
        part = self._part(state)
        if part.index is None:
            return
        assert self._writer is not None
        # Listing thousands of tensors takes milliseconds, so the writer's thread does that, too.
        task = SaveTask(state.step, lambda: self._snapshot(state), part, began)
        self._task = task
        task.future = self._pool.submit(self._writer.run, task)
        task.stall_seconds = self._clock() - began

    def mark_updated(self) -> None:
        """Record that the state has changed: from now on a save may copy it."""
        self._copy.mark_changed()

    def before_update(self) -> None:
        """Wait until a running save has copied the state, so that it may change."""
        task = self._task
        if task is not None and not task.copied.is_set():
            began = self._clock()
            task.copied.wait()
            task.stall_seconds += self._clock() - began

    def save_and_wait(self, state: TrainState) -> None:
        """Commit the state. Return on every rank when it is committed; retry until the staleness limit.

        Raises:
            StaleError: the newest checkpoint is older than the run allows.
            SupersededError: a newer attempt has begun.
            FabricError: a peer was lost.
        """
        pause = 1.0
        while not self.try_to_save(state):
            is_stale = self._world.is_first and self._health.is_stale(self._clock() - self._saved_at + pause)
            # Every rank reports the reason, because the first rank to exit is recorded as the cause.
            if reason := self._world.share(self._health.stale_message() if is_stale else ""):
                raise StaleError(reason)
            is_noticed = pause_together(pause, self._options.pause, self._world.gather_numbers)
            pause = 1.0 if is_noticed else min(2 * pause, 30.0)

    def try_to_save(self, state: TrainState) -> bool:
        """Save the state and wait for the end. Return on every rank whether the state is committed.

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
            self._collect_drain()
        is_safe = not self._world.is_first or not self._health.error
        if all(self._world.gather_numbers(int(is_safe))):
            self._safe_step = state.step
            return True
        self._begun_step = -1
        return False

    def emergency_save(self, state: TrainState) -> None:
        """Save the last finished step unless another rank has: a peer was lost, or a read failed. From any thread.

        It runs at most once. Never raises: if it fails, the attempt loses only what it would have lost without it.
        """
        if self._emergency_save is not None:
            self._emergency_save.run(state, self._task)

    def _part(self, state: TrainState) -> SavePart:
        """Return which part of this state this rank saves."""
        rank, sharing = self._role.rank, self._role.sharing
        if self._role.own_disk:
            return SavePart(0, (rank,), rank)
        if state.is_sharded:
            return SavePart(rank, sharing, rank)
        if self._size_bytes is None:
            self._size_bytes = total_bytes(state.snapshot({}).tensors)
        writers = sharing[: num_parts(self._size_bytes, len(sharing), self._options.min_part_bytes)]
        return SavePart(writers.index(rank) if rank in writers else None, writers, rank)

    def _snapshot(self, state: TrainState) -> Snapshot:
        about = {
            **self._options.about(),
            "cursor": state.step * self._spec.global_batch,
            "global_batch": self._spec.global_batch,
            "seed": self._spec.training.seed,
            "world_size": self._world.size,
        }
        return state.snapshot(about)

    def _late_values(self) -> dict[str, Any]:
        return {BEST: self._options.best()}

    def _finish_last(self) -> None:
        """Wait on all ranks for the end of the running save."""
        if self._task is not None:
            self._task.written.wait()
        # After this exchange every part is written, so the committing rank never waits for a rank that may be lost.
        # A barrier would not do this: on a GPU it is only queued.
        self._world.gather_numbers(0)
        self._wait_for_last()

    def _host_snapshot(self, state: TrainState) -> Snapshot:
        """Return the state in host memory, even if the GPU's own stream hangs in a collective."""
        snapshot = self._snapshot(state)
        values = {**snapshot.values, **self._late_values()}
        return Snapshot(snapshot.step, self._copy.copy_to_host(snapshot.tensors), values)

    def _wait_for_last(self) -> None:
        if self._task is not None:
            _wait_for(self._task.future)
            self._collect_last()

    def _collect_last(self) -> None:
        """Collect the result of the last save, if it has ended.

        Raises:
            SupersededError: a newer attempt has begun.
        """
        self._collect_drain()
        task = self._task
        if task is None or not task.future.done():
            return
        self._task = None
        error = task.future.exception()
        if error is None:
            if task.part.commits:
                if self._drain is None:
                    self._record_durable(task.begun_at)
                self._cost_seconds = task.stall_seconds + task.work_seconds
        elif isinstance(error, StorageError | FabricError):
            self._health.record_failure(str(error), self._clock())
        else:
            raise error

    def _collect_drain(self) -> None:
        """Collect the result of the last copy from scratch to the durable storage, if one has ended.

        Raises:
            SupersededError: a newer attempt has begun.
        """
        result = None if self._drain is None else self._drain.take_result()
        if result is None:
            return
        if result.error is None:
            self._record_durable(result.begun_at)
        elif isinstance(result.error, StorageError):
            self._health.record_failure(str(result.error), self._clock())
        else:
            raise result.error

    def _record_durable(self, begun_at: float) -> None:
        """Record that the state which the loop had at this time survives the loss of this machine."""
        self._health.record_success()
        self._saved_at = begun_at

    def _report_committed(self, task: SaveTask, committed: Committed) -> None:
        """Report a commit. The writer's thread calls it. A checkpoint on scratch alone is not reported."""
        if self._drain is not None:
            self._stall_seconds = task.stall_seconds
            self._drain.offer(committed, task.begun_at)
        elif not self._has_scratch:
            self._report(committed, task.stall_seconds, self._clock() - task.begun_at)

    def _report_drained(self, committed: Committed, begun_at: float) -> None:
        """Report a checkpoint that reached the durable storage. The drain's thread calls it."""
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


def _wait_for(future: Future[Any]) -> None:
    """Wait for the end of a save; its error is not raised here."""
    future.exception()


def _yield_to_training() -> None:
    """Lower the priority of this thread, and leave the CPUs that compute; on Linux both are per thread."""
    use_helper_cpus()
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
