"""Saving from the loop: rank 0 writes, and all ranks know why."""

from __future__ import annotations

import time
from collections.abc import Callable

from finetune_contract.beat import CommittedCheckpoint, RankState
from finetune_contract.run_spec import RunSpec
from finetune_trainer.checkpoint.interval import SaveClock, save_due
from finetune_trainer.checkpoint.store import CheckpointStore, Committed, Snapshot
from finetune_trainer.distributed.world import World
from finetune_trainer.train.report import Reporter
from finetune_trainer.train.state import TrainState


class Checkpointer:
    """The checkpoints of a run, as the loop sees them.

    Args:
        store: the storage; None on every rank but 0.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        spec: RunSpec,
        world: World,
        store: CheckpointStore | None,
        reporter: Reporter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._world = world
        self._store = store
        self._reporter = reporter
        self._clock = clock
        self._saved_step = 0
        self._saved_at = clock()
        self._save_seconds: float | None = None

    def restore(self, state: TrainState) -> None:
        """Go on from the newest checkpoint that verifies, if there is one; rank 0 reads, and tells the others all.

        Raises:
            ConfigError: it is of another model than the run specification asks for.
            StorageError: the storage cannot be read.
            SupersededError: a newer attempt has begun.
        """
        snapshot: Snapshot | None = None
        if self._store is not None:
            self._store.open()
            committed = self._store.choose(self._reporter.warn)
            if committed is not None:
                snapshot = self._store.load(committed)
                self._report(committed)
        snapshot = _share(snapshot, self._world)
        if snapshot is not None:
            state.restore(snapshot)
        self._saved_step = state.step
        self._saved_at = self._clock()

    def due(self, step: int) -> bool:
        """Whether the state after this step should be saved. Only rank 0 knows: the clocks of the ranks differ."""
        if self._store is None:
            return False
        clock = SaveClock(step - self._saved_step, self._clock() - self._saved_at, self._save_seconds)
        return save_due(self._spec.checkpoint_interval, clock)

    def save(self, state: TrainState) -> None:
        """Commit the state, unless it is committed already.

        Raises:
            StorageError: it cannot be written.
            SupersededError: a newer attempt has begun.
        """
        if state.step == self._saved_step:
            return
        self._saved_step = state.step
        if self._store is None:
            return
        self._reporter.state(RankState.SAVING)
        began = self._clock()
        about = {
            "cursor": state.step * self._spec.global_batch,
            "global_batch": self._spec.global_batch,
            "seed": self._spec.training.seed,
            "world_size": self._world.size,
        }
        self._report(self._store.save(state.snapshot(about), time.time()))
        self._saved_at = self._clock()
        self._save_seconds = self._saved_at - began

    def save_and_wait(self, state: TrainState) -> None:
        """Commit the state, and return on every rank only when it is committed."""
        self.save(state)
        self._world.barrier()

    def _report(self, committed: Committed) -> None:
        manifest = committed.manifest
        self._reporter.checkpoint(
            CommittedCheckpoint(
                step=manifest.step, time=manifest.time, size_bytes=committed.size_bytes, attempt=manifest.attempt
            )
        )


def _share(snapshot: Snapshot | None, world: World) -> Snapshot | None:
    """Give every rank what rank 0 has read, so that no disk need be shared."""
    header = None
    if snapshot is not None:
        header = (snapshot.step, dict(snapshot.values), sorted(snapshot.tensors))
    header = world.share(header)
    if header is None:
        return None
    step, values, groups = header
    tensors = {group: world.share_tensors(None if snapshot is None else snapshot.tensors[group]) for group in groups}
    return Snapshot(step, tensors, values)
