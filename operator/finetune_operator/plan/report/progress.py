"""How far the job is: what the beats and the last words of the attempt's pods say, written into the status.

Only the newest attempt is heard; what an older one still has to say changes nothing. Within an attempt the step
never falls; over attempts it does, by the steps that were lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TypeVar

from finetune_contract.heartbeat import RankState
from finetune_contract.phase import Phase
from finetune_operator.api.duration import format_seconds
from finetune_operator.api.job import AttemptStatus, CheckpointStatus, FineTuneJobStatus, OutputStatus
from finetune_operator.api.reasons import CountsAs
from finetune_operator.manifests import global_batch
from finetune_operator.plan.model.ledger import account_lost_steps, current, replace_current
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.report import checkpoint_health

T = TypeVar("T")
MAX_WARNINGS = 10
"""Sentences of the trainer that the status keeps."""


def read(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write what the attempt's ranks report."""
    if is_finished(status):
        return _read_results(view, status) if status.phase is Phase.SUCCEEDED else status
    total_steps = _first(report.total_steps for report in view.reports)
    status = revise(status, total_steps=total_steps or status.total_steps or view.spec.training.steps)
    entry = current(status)
    if entry is None:
        return status
    status = _read_steps(view, status, entry)
    status = account_lost_steps(status)
    return _read_figures(view, _read_results(view, status))


def _read_results(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """What stays of a job. The last beat may come after its pod was seen to end."""
    if current(status) is None:
        return status
    status = checkpoint_health.note(view, _read_checkpoint(view, status))
    status = _read_outputs(view, status)
    return _read_warnings(view, status)


def _read_steps(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> FineTuneJobStatus:
    """Where the attempt began, how far it has come, and how long its steps took."""
    from_step = entry.from_step
    if from_step is None:
        from_step = _first(report.restored_step for report in view.reports)
    to_step = max((step for step in (entry.to_step, *_seen_steps(view)) if step is not None), default=None)
    seen_at = _newest_beat_at(view)
    training_at = entry.training_at
    if training_at is None and to_step is not None and to_step > (from_step or 0):
        training_at = seen_at
    status = _tally_steps(status, entry, from_step, to_step, seen_at)
    entry = revise(entry, from_step=from_step, to_step=to_step, training_at=training_at)
    status = replace_current(status, entry)
    return status if to_step is None else revise(status, step=to_step)


def _seen_steps(view: View) -> list[int | None]:
    """Finished steps by the newest word of each rank, or of its supervisor at the end."""
    terminations = (pod.termination for pod in view.pods.values())
    ends = [end.step for end in terminations if end is not None and end.attempt == view.attempt]
    return [report.step for report in view.reports] + ends


def _newest_beat_at(view: View) -> datetime:
    return max((received.received_at for received in view.beats.values()), default=view.now)


def _tally_steps(
    status: FineTuneJobStatus,
    entry: AttemptStatus,
    from_step: int | None,
    to_step: int | None,
    seen_at: datetime,
) -> FineTuneJobStatus:
    """Add the steps that were finished since the last look, and the time since then."""
    before = entry.to_step if entry.to_step is not None else from_step
    if to_step is None or before is None or to_step <= before:
        return status
    tally = status.tally
    seconds = 0.0
    # The time before an attempt's first step is that of its loading, and is not counted.
    if entry.training_at is not None:
        since = max(entry.training_at, tally.step_time or entry.training_at)
        seconds = (seen_at - since).total_seconds()
    tally = revise(
        tally,
        trained_steps=tally.trained_steps + to_step - before,
        trained_seconds=round(tally.trained_seconds + max(0.0, seconds), 3),
        step_time=seen_at,
    )
    return revise(status, tally=tally)


def _read_checkpoint(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """The newest checkpoint: of the newest attempt that committed one, the one of the most steps.

    Not by its time: that is by the clock of the rank that wrote it.
    """
    found = [report.checkpoint for report in view.reports if report.checkpoint is not None]
    if not found:
        return status
    newest = max(found, key=lambda checkpoint: (checkpoint.attempt, checkpoint.step))
    known = status.last_checkpoint
    if known is not None and (newest.attempt, newest.step) <= (known.attempt or 0, known.step):
        return status
    checkpoint = CheckpointStatus(
        step=newest.step,
        time=_moment(newest.time, view.now),
        bytes=newest.size_bytes,
        attempt=newest.attempt,
        save_seconds=_figure(newest.durable_seconds) if newest.durable_seconds is not None else None,
        stall_seconds=_figure(newest.stall_seconds),
    )
    if newest.interval_seconds is not None:
        status = revise(status, checkpoint_interval_seconds=newest.interval_seconds)
    entry = current(status)
    assert entry is not None
    # Where the attempt has failed after it, that failure is one since the checkpoint.
    num_failures = 1 if entry.counts_as == CountsAs.FAILURE else 0
    tally = revise(status.tally, failures_since_checkpoint=min(num_failures, status.tally.failures_since_checkpoint))
    return revise(status, last_checkpoint=checkpoint, tally=tally)


def _read_outputs(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Every output that was written whole; one that was written again counts as it is now."""
    outputs = {(output.format, output.to): output for output in status.outputs}
    for report in view.reports:
        for written in report.outputs:
            outputs[written.format, written.to] = OutputStatus(
                format=written.format, to=written.to, bytes=written.size_bytes, sha256=written.sha256
            )
    return revise(status, outputs=tuple(outputs.values()))


def _read_warnings(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """What the ranks warn of, each sentence once: all of those that they repeat, and of the older ones what fits."""
    said = list(dict.fromkeys(warning for report in view.reports for warning in report.warnings))[-MAX_WARNINGS:]
    if set(said) <= set(status.warnings):
        return status
    others = [warning for warning in status.warnings if warning not in said]
    known = [warning for warning in status.warnings if warning in said]
    fresh = [warning for warning in said if warning not in known]
    return revise(status, warnings=(*others, *known, *fresh)[-MAX_WARNINGS:])


def _read_figures(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Loss, speed, share and time left. What nobody reports any more stays as it was last seen."""
    loss = _first(_figure(report.loss) for report in view.reports)
    speed = _first(_figure(report.images_per_second) for report in view.reports if report.state in AT_SPEED)
    step, total_steps = status.step, status.total_steps
    return revise(
        status,
        loss=loss if loss is not None else status.loss,
        images_per_second=speed if speed is not None else status.images_per_second,
        progress=f"{100 * step // total_steps}%" if step is not None and total_steps else status.progress,
        eta=_eta(view, step, total_steps, speed) or status.eta,
    )


AT_SPEED = frozenset({RankState.TRAINING, RankState.SAVING, RankState.VALIDATING})


def _eta(view: View, step: int | None, total_steps: int | None, speed: float | None) -> str | None:
    if step is None or total_steps is None or not speed:
        return None
    return format_seconds(max(0, total_steps - step) * global_batch(view.spec) / speed)


def _figure(number: float | None) -> float | None:
    """A number as people read it, with four digits; None for one that JSON cannot hold."""
    return float(f"{number:.4g}") if number is not None and math.isfinite(number) else None


def _moment(seconds: float, otherwise: datetime) -> datetime:
    """Seconds since the epoch by another machine's clock, however far that is off."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return otherwise


def _first(values: Iterable[T | None]) -> T | None:
    """The first value that is there: that of the lowest rank that has one."""
    return next((value for value in values if value is not None), None)
