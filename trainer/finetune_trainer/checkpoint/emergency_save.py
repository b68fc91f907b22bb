"""The emergency save (just-in-time checkpoint): a survivor of replicated training saves the last finished step.

Every replica holds the complete state, and the state changes only in the optimizer's step. So when a collective fails
or hangs because a peer was lost, any survivor can save the gang's progress, and the loss of a rank loses no step
(cf. "Just-In-Time Checkpointing", EuroSys 2024). Survivors coordinate through the storage alone: the first claims the
step and writes it; the others wait for the commit, and write the step themselves if it does not appear in time.

A rank that cannot read a sample for the next step, because of an outage, does the same before it ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from finetune_contract.heartbeat import RankState
from finetune_trainer.checkpoint.save_task import SaveTask
from finetune_trainer.checkpoint.snapshot import Committed, Snapshot
from finetune_trainer.checkpoint.split import total_bytes
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.checkpoint.store.base import CheckpointStore
from finetune_trainer.errors import RankError
from finetune_trainer.report import Reporter

_LOG = logging.getLogger(__name__)
UPDATE_LOCK_SECONDS = 30.0
"""Time limit for a running update, or a running use of the moving average, to finish."""
CLAIM_SECONDS = 15.0
"""Time limit of the rank that claimed a step, in addition to the time for its bytes; then another rank writes."""
SLOWEST_BYTES_PER_SECOND = 50e6
"""Lowest write speed that the wait for the claiming rank assumes."""
POLL_SECONDS = 0.05


class EmergencySave:
    """Saves the last finished step once, from the first thread that requests it."""

    def __init__(
        self,
        rank: int,
        store: CheckpointStore,
        reporter: Reporter,
        snapshot: Callable[[TrainState], Snapshot],
        report: Callable[[Committed], None],
    ) -> None:
        self._rank = rank
        self._store = store
        self._reporter = reporter
        self._snapshot = snapshot
        self._report = report
        self._lock = threading.Lock()
        self._has_run = False

    def run(self, state: TrainState, task: SaveTask | None, claim_seconds: float = CLAIM_SECONDS) -> None:
        """Save the state's step unless it is committed.

        Args:
            state: the loop cannot change it after this call has started.
            task: the running ordinary save; its end is awaited, but not the parts of lost peers.
            claim_seconds: see CLAIM_SECONDS.
        """
        with self._lock:
            if self._has_run:
                return
            self._has_run = True
            # Never released: no thread may change the state after this.
            if not state.update_lock.acquire(timeout=UPDATE_LOCK_SECONDS) or state.torn:
                _LOG.warning("emergency save skipped: the state is in the middle of an update")
                return
            try:
                self._save(state, task, claim_seconds)
            except RankError as error:
                _LOG.warning("emergency save of step %d failed: %s", state.step, error)
            except Exception:
                _LOG.exception("emergency save of step %d failed", state.step)

    def _save(self, state: TrainState, task: SaveTask | None, claim_seconds: float) -> None:
        # The supervisor gives a rank in this state time to finish.
        self._reporter.state(RankState.SAVING)
        if task is not None:
            task.abandoned.set()
            task.future.exception()
        if state.step == 0 or self._store.holds(state.step):
            return
        snapshot = self._snapshot(state)
        seconds = claim_seconds + total_bytes(snapshot.tensors) / SLOWEST_BYTES_PER_SECOND
        if not self._store.claim(state.step) and self._wait_for_commit(state.step, seconds):
            return
        committed = self._store.save(snapshot, time.time(), f"-r{self._rank}")
        _LOG.info("emergency save: rank %d saved step %d", self._rank, state.step)
        self._report(committed)

    def _wait_for_commit(self, step: int, seconds: float) -> bool:
        """Wait until another rank has committed the step; return False after the timeout."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._store.holds(step):
                return True
            time.sleep(POLL_SECONDS)
        return False
