"""The just-in-time checkpoint: a survivor of replicated training saves the last finished step when a peer is gone.

Every replica holds the whole state, and the state changes only in the optimizer's step. So when a collective fails or
hangs because a peer died, whoever is left can save what the gang has done, and sudden death loses no step
(cf. "Just-In-Time Checkpointing", EuroSys 2024). Survivors agree through the storage alone: the first claims the step
and writes it; the others wait for that, and write it themselves where nothing comes of it.
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
WHOLE_SECONDS = 30.0
"""How long an update, or a look at the average, may take that is under way when the word comes."""
CLAIM_SECONDS = 15.0
"""How long the one who claimed a step may take before another one writes it, and what it may take for each byte."""
SLOWEST_BYTES_PER_SECOND = 50e6
POLL_SECONDS = 0.05


class EmergencySave:
    """Saves the last finished step once, from whichever thread comes first."""

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
        self._is_over = False

    def run(self, state: TrainState, task: SaveTask | None, claim_seconds: float = CLAIM_SECONDS) -> None:
        """Save the state's step unless it is saved.

        Args:
            state: the loop changes it no more once this has begun.
            task: the ordinary save that is under way; it is waited for, but not for the parts of lost peers.
            claim_seconds: see CLAIM_SECONDS.
        """
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            # Never let go: nobody changes the state behind this.
            if not state.whole.acquire(timeout=WHOLE_SECONDS) or state.torn:
                _LOG.warning("the state is in the middle of an update: nothing can be saved")
                return
            try:
                self._save(state, task, claim_seconds)
            except RankError as error:
                _LOG.warning("step %d could not be saved for the lost peer: %s", state.step, error)
            except Exception:
                _LOG.exception("step %d could not be saved for the lost peer", state.step)

    def _save(self, state: TrainState, task: SaveTask | None, claim_seconds: float) -> None:
        # A rank that says so is given the time.
        self._reporter.state(RankState.SAVING)
        if task is not None:
            task.abandoned.set()
            task.future.exception()
        if state.step == 0 or self._store.holds(state.step):
            return
        snapshot = self._snapshot(state)
        seconds = claim_seconds + total_bytes(snapshot.tensors) / SLOWEST_BYTES_PER_SECOND
        if not self._store.claim(state.step) and self._other_saves(state.step, seconds):
            return
        committed = self._store.save(snapshot, time.time(), f"-r{self._rank}")
        _LOG.info("a peer is gone: step %d was saved by rank %d", state.step, self._rank)
        self._report(committed)

    def _other_saves(self, step: int, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._store.holds(step):
                return True
            time.sleep(POLL_SECONDS)
        return False
