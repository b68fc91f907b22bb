"""One run of a script: counts its steps, agrees with the other ranks between two steps, and saves when it is time.

A step is complete when the script requests the next batch: by then it has updated the learning rate and the moving
average, counted the step and logged it. Only at that moment ("boundary") is the state of all objects consistent, so all
ranks post their votes there (see `agreement`), and save there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState
from finetune_contract.spec import CheckpointInterval
from finetune_trainer.checkpoint.health import CheckpointHealth
from finetune_trainer.checkpoint.interval import SaveClock, due_seconds, save_due
from finetune_trainer.errors import RankError, StorageOutageError, SupersededError
from finetune_trainer.report import Reporter
from finetune_trainer.script.agreement.votes import Agreement, Pending, Verdict
from finetune_trainer.script.boundary import Boundary, device_event, learning_rate, other_stream, unpack
from finetune_trainer.script.checkpoints import BY_SCRIPT
from finetune_trainer.script.figures import Figures
from finetune_trainer.script.position import TrackedLoader
from finetune_trainer.script.random_state import RandomState, capture, restore
from finetune_trainer.script.saver import RankRecord, Saver, read_record
from finetune_trainer.script.script_saves import ScriptSaves
from finetune_trainer.script.source import ScriptFacts
from finetune_trainer.train.preemption_notice import PreemptionNotice

_LOG = logging.getLogger(__name__)
UPDATE_SECONDS = 30.0
"""Time limit for a step that runs to reach its boundary, before an emergency save gives up."""


def _always() -> bool:
    return True


class SavedExit(SystemExit):
    """Ends the script after a save on a preemption notice."""


@dataclass(frozen=True)
class SessionOptions:
    """Settings of a run.

    Attributes:
        notice: the preemption notice of this rank.
        interval: when to save.
        mtbf_seconds: mean time between the job's interruptions.
        max_stale_seconds: age of the newest checkpoint at which the run fails if none can be written.
        facts: what the text of the script shows.
    """

    notice: PreemptionNotice
    interval: CheckpointInterval
    mtbf_seconds: float
    max_stale_seconds: float
    facts: ScriptFacts


class Session:
    """The run of one script in this process."""

    def __init__(
        self,
        options: SessionOptions,
        agreement: Agreement,
        saver: Saver,
        figures: Figures,
        reporter: Reporter,
    ) -> None:
        self.accelerator: Any = None
        self.step = 0
        self.figures = figures
        self.num_seeds = 0
        """Calls that set the seed of torch's generator."""
        self._options = options
        self._peers = agreement.peers
        self._saver = saver
        self._reporter = reporter
        self._notice = options.notice
        self._agreement = agreement
        self._loaders: list[TrackedLoader] = []
        self._at_step: list[TrackedLoader] = []
        """Loaders that the script was reading during the last step."""
        self._optimizer: Any = None
        """The optimizer whose steps count."""
        self._is_open = False
        """Whether a step has ended whose boundary has not been reached."""
        self._has_trained = False
        self._saves = ScriptSaves(saver, self._peers.rank)
        self._after_epoch: tuple[RandomState, int] | None = None
        self._boundary: Boundary | None = None
        self._update = threading.Lock()
        """Held from the start of an update to its boundary."""
        self._health = CheckpointHealth(options.max_stale_seconds, reporter)
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._save_seconds: float | None = None
        self._released = ExitStack()
        self._after_restore: RandomState | None = None
        self._num_images = 0
        self._random: RandomState | None = None
        """State of the generators at the last boundary."""
        self._until_done: Callable[[], bool] = _always
        """Called at each boundary until it returns true."""

    @property
    def output_folder(self) -> Path:
        """Folder that the script writes to."""
        return self._saver.checkpoints.folder

    def on_boundary(self, attempt: Callable[[], bool]) -> None:
        """Call a function at each boundary until it returns true."""
        self._until_done = attempt

    # ---- the script's objects ----

    def bind(self, accelerator: Any) -> None:
        """Use the script's accelerator: the first one counts."""
        if self.accelerator is None:
            self.accelerator = accelerator

    def track(self, loader: Any) -> None:
        """Follow a prepared loader. One that saves its own position is left to accelerate."""
        if getattr(loader, "use_stateful_dataloader", False) or not hasattr(loader, "base_dataloader"):
            return
        if self.tracked(loader) is None:
            tracked = TrackedLoader(loader, self)
            self._loaders.append(tracked)
            loader.base_dataloader.finetune_loader = tracked

    def tracked(self, loader: Any) -> TrackedLoader | None:
        """Return the record of a prepared loader; None if it is not followed."""
        return next((each for each in self._loaders if each.loader is loader), None)

    # ---- steps ----

    def before_step(self, optimizer: Any) -> None:
        """The script starts an update of the weights."""
        if self._optimizer is None:
            self._optimizer = optimizer
        if not self._has_trained:
            self._has_trained = True
            self._saved_at = time.monotonic()
            self.figures.begin(self.step)
            self._reporter.state(RankState.TRAINING)
        self._released.close()
        self._notice.hold()
        if not self._is_open:
            self._is_open = True
            self._update.acquire()

    def after_step(self, optimizer: Any) -> None:
        """The script has updated the weights."""
        if optimizer is self._optimizer:
            self.step += 1
            self._at_step = [loader for loader in self._loaders if loader.is_active]

    @property
    def step_bar_is_open(self) -> bool:
        """Return whether the progress bar of the steps may still be created: before the first step."""
        return not self._has_trained

    def validates(self) -> None:
        """The script draws images. It may take longer than a step; the next boundary ends it."""
        if self._has_trained:
            self._num_images += 1
            self._reporter.state(RankState.VALIDATING)
            self._reporter.detail(f"image {self._num_images}")

    def count_step(self, optimizer: Any) -> None:
        """Count a step of a script that does not use accelerate."""
        if self._optimizer is None:
            self._optimizer = optimizer
            self.figures.begin(0)
            self._reporter.state(RankState.TRAINING)
        if optimizer is self._optimizer:
            self.step += 1
            self.figures.after_step(self.step, learning_rate(optimizer))

    # ---- LoopObserver ----

    def before_batch(self, loader: TrackedLoader) -> None:
        """Reach the boundary of the last step if the script requests the next batch of a loader that it trains on."""
        if not self._is_open or loader not in self._at_step:
            return
        ends = bool(loader.loader.end_of_dataloader)
        self.reach_boundary(may_save=not ends)
        if ends:
            self._after_epoch = (capture(), self.num_seeds)
        else:
            # Nothing draws between the boundary and the read of the batch after the next one.
            loader.knows(self._random)

    def before_epoch(self, loader: TrackedLoader) -> bool:
        """Undo the draws that the script has made between two epochs; return whether anything is left to train."""
        if self._after_epoch is not None and loader in self._at_step:
            state, num_seeds = self._after_epoch
            self._after_epoch = None
            if num_seeds == self.num_seeds:
                # Validation draws on rank 0 only, and a resumed run does not repeat it.
                restore(state)
            self._save_if_due()
        return not (loader.is_resumed and self.is_complete and not self._has_trained)

    def after_batch(self, batch: Any) -> None:
        """Count the samples of a batch."""
        self.figures.saw_batch(batch)

    def after_restore(self, loader: TrackedLoader) -> RandomState:
        """Return the state at the checkpoint for the first loader, and the current one for the others."""
        state, self._after_restore = self._after_restore, None
        return state or capture()

    def skips_by_step(self) -> bool:
        """Return whether the script skips batches itself after a resume."""
        return self._options.facts.skips_by_step

    # ---- boundaries ----

    @property
    def is_complete(self) -> bool:
        """Return whether all steps that the script announces are trained."""
        return self.figures.total_steps is not None and self.step >= self.figures.total_steps

    def finish(self) -> None:
        """Commit the last step: the script has left its loop."""
        if not self._has_trained or (self.is_reading and not self.is_complete):
            return
        if self._is_open:
            self.reach_boundary(may_save=False)
        self._act(self._agreement.collect(), may_save=False)
        self._settle()
        if self.step > self._saved_step:
            self._save("final")
        self._reporter.state(RankState.EXPORTING)
        # Everything is saved: a preemption notice ends the rank at once, and the next attempt repeats the end.
        self._released.close()
        self._released.enter_context(self._notice.released())

    @property
    def is_reading(self) -> bool:
        """Return whether the script is inside a loop over a loader that it trains on."""
        return any(loader.is_active for loader in self._at_step)

    def before_backward(self) -> None:
        """Reach the boundary here if the script reads its data from a loader that accelerate has not prepared."""
        if self._is_open and not self._at_step:
            self.reach_boundary(may_save=True)

    def reach_boundary(self, *, may_save: bool) -> None:
        """Agree with the other ranks after a step, and save if that is necessary.

        Args:
            may_save: whether an ordinary save may be taken here; otherwise `_save_if_due` follows.

        Raises:
            SavedExit: this rank has saved on a preemption notice.
            RankError: the run cannot continue.
        """
        self._is_open = False
        record = self._record()
        self._random = record.random
        self._boundary = None
        self._update.release()
        self._reporter.state(RankState.TRAINING)
        if self._until_done():
            self._until_done = _always
        self.figures.after_step(self.step, learning_rate(self._optimizer))
        self._act(self._agreement.collect(), may_save=may_save)
        pending = self._saves.take()
        is_due = (may_save and pending is None and self._is_due(self._agreement.delay)) or self._saves.is_requested
        self._agreement.post(record, notice=self._notice.given, due=is_due, pending=pending)
        self._boundary = Boundary(record, device_event())
        if not self._agreement.delay:
            self._act(self._agreement.collect(), may_save=may_save)

    def _act(self, verdict: Verdict | None, *, may_save: bool) -> None:
        """Do what the ranks have agreed on at the last boundary."""
        if verdict is None:
            return
        if verdict.has_pending:
            self._commit(verdict.pending, verdict.record)
        if verdict.notice:
            self._settle()
            self._save_and_exit()
        if verdict.due and may_save:
            self._settle()
            if self.step > self._saved_step:
                self._save("interval")

    def _settle(self) -> None:
        """Commit the checkpoint that the script has written in the step before this boundary, if there is one."""
        pending = self._saves.take()
        if self._peers.sum([int(pending is not None)])[0]:
            self._commit(pending, self._record())

    def _save_if_due(self) -> None:
        """Save between two epochs if an ordinary save is due there."""
        self._act(self._agreement.collect(), may_save=True)
        is_due = self._saves.is_requested or self._is_due(0)
        due, notice = self._peers.sum([int(is_due), int(self._notice.given)])
        if notice:
            self._save_and_exit()
        if due and self.step > self._saved_step:
            self._save("interval")

    def _record(self) -> RankRecord:
        positions = {index: loader.position() for index, loader in enumerate(self._loaders)}
        batches = int(getattr(self.accelerator, "step", 0))
        return RankRecord(self.step, batches, self._peers.size, capture(), positions)

    def _is_due(self, delay: int) -> bool:
        """Return whether rank 0 wants an ordinary save after `delay` steps; check the age of the newest checkpoint."""
        if self._peers.rank or self.accelerator is None or self._saves.pending is not None:
            return False
        since = time.monotonic() - self._saved_at
        self._health.check(since)
        if self._health.error:
            return self._health.retry_due(time.monotonic())
        clock = SaveClock(self.step + delay - self._saved_step, since, self._save_seconds, self._options.mtbf_seconds)
        return save_due(self._options.interval, clock)

    # ---- saves ----

    def save_by_script(self, folder: str | None, save: Callable[[str | None], Any]) -> Any:
        """Save as the script requests; see `ScriptSaves.save`."""
        self._reporter.state(RankState.SAVING)
        return self._saves.save(self.accelerator, folder, save)

    def deletes_later(self, folder: Path) -> bool:
        """Return whether the deletion of a folder has to wait: it is a checkpoint that is, or will be, committed."""
        return self._saves.deletes_later(folder, self._agreement.pending_folder)

    def _commit(self, pending: Pending | None, record: RankRecord) -> None:
        """Commit what the script has written.

        Args:
            pending: of rank 0: its present folder, and its final one.
            record: of this rank, after the step in which the script has saved.
        """
        shared = self._peers.share(pending)
        assert shared is not None
        self._write(shared[1], shared[0], record, BY_SCRIPT)

    def _save(self, by: str) -> bool:
        folder = self._saver.checkpoints.folder
        return self._write(folder / f"{self._options.facts.checkpoint_prefix}{self.step}", None, self._record(), by)

    def _write(self, final: Path, written: Path | None, record: RankRecord, by: str) -> bool:
        """Save on all ranks; return whether the checkpoint is committed. The draws of the script are not changed."""
        if self.accelerator is None:
            return False
        self._reporter.state(RankState.SAVING)
        if written is None and not self._is_open:
            # If a peer is lost now, the survivors save the same step.
            self._boundary = Boundary(record, device_event())
        begun, random = time.monotonic(), capture()
        found, error = self._saver.save(self.accelerator, final, written, record, by)
        restore(random)
        now = time.monotonic()
        self._save_seconds = now - begun
        if error:
            self._health.record_failure(f"checkpoint storage: {error}", now)
        else:
            self._health.record_success()
            self._saved_step, self._saved_at, self._saves.is_requested = record.step, now, False
            if found is not None:
                self._saver.checkpoints.prune(found.folder, self._saves.take_deletions(found.folder))
                clock = SaveClock(0, 0.0, self._save_seconds, self._options.mtbf_seconds)
                seconds = due_seconds(self._options.interval, clock)
                self._saver.report(found, self._save_seconds, None if seconds == float("inf") else seconds)
        self._reporter.state(RankState.TRAINING)
        self.figures.resume_clock()
        return not error

    def _save_and_exit(self) -> None:
        if self.step > self._saved_step and not self._save("notice"):
            raise StorageOutageError(self._health.error)
        _LOG.info("saved step %d on a preemption notice", self.step)
        raise SavedExit(int(ExitCode.SAVED))

    # ---- restore ----

    def loaded(self, folder: Path, step: int | None) -> None:
        """The script has read a checkpoint: restore what accelerate does not.

        Args:
            folder: of the checkpoint.
            step: of its manifest; None if it has none.
        """
        record = read_record(folder, self._peers.rank) if step is not None else None
        if record is not None and record.world_size != self._peers.size:
            self._reporter.warn(
                f"checkpoint {folder.name} is of {record.world_size} ranks and this attempt has {self._peers.size}: "
                "the position in the data and the random draws are not restored"
            )
            record = None
        if step is not None:
            self.step = self._saved_step = step
        if record is None:
            return
        for index, position in record.positions.items():
            if index < len(self._loaders):
                self._loaders[index].resume(position)
        self._after_restore = record.random
        self.accelerator.step = record.batches
        restore(record.random)

    # ---- loss of a peer ----

    def emergency_save(self) -> None:
        """Save the last finished step without the lost peer, from any thread. The script no longer runs after it."""
        if not self._update.acquire(timeout=UPDATE_SECONDS):
            _LOG.warning("emergency save skipped: the state is in the middle of an update")
            return
        boundary = self._boundary
        if boundary is None or self._peers.size == 1 or self.accelerator is None:
            return
        record = boundary.record
        if record.step <= self._saved_step:
            return
        self._reporter.state(RankState.SAVING)
        copies = {rank: unpack(state) for rank, state in self._agreement.copies().items()}
        # The peers may have posted their state of another step last.
        records = {rank: copy for rank, copy in copies.items() if copy.step == record.step}
        records[self._peers.rank] = record
        final = self._saver.checkpoints.folder / f"{self._options.facts.checkpoint_prefix}{record.step}"
        try:
            with other_stream(boundary.ready):
                found = self._saver.save_alone(self.accelerator, final, records)
        except (OSError, RankError, SupersededError) as error:
            _LOG.warning("emergency save of step %d failed: %s", record.step, error)
        except Exception:
            _LOG.exception("emergency save of step %d failed", record.step)
        else:
            if found is not None:
                _LOG.info("emergency save: rank %d saved step %d", self._peers.rank, record.step)
                self._saver.report(found, 0.0, None)
