"""The progress of the job, read from the heartbeats and termination messages of the attempt's pods.

Only those of the newest attempt count. Within an attempt the step never decreases; between attempts it does, by the
steps that were lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TypeVar

from finetune_contract.heartbeat import MAX_SECONDS, OutputState, RankState, UnfinishedOutput
from finetune_contract.identity import MAX_INPUTS
from finetune_contract.phase import Phase
from finetune_operator.api.duration import format_seconds
from finetune_operator.api.reasons import CountsAs
from finetune_operator.api.status import AttemptStatus, CheckpointStatus, FineTuneJobStatus, InputStatus, OutputStatus
from finetune_operator.manifests import global_batch
from finetune_operator.plan.model.ledger import account_lost_steps, current, replace_current
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.report import checkpoint_health, performance

T = TypeVar("T")
MAX_WARNINGS = 10
"""Maximum number of the trainer's warnings in the status."""
MAX_OUTPUTS = 100
"""Maximum number of outputs in the status."""


def read(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write what the ranks of the attempt report."""
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
    """Write checkpoints, outputs and warnings. The last heartbeat may arrive after the end of its pod was observed."""
    if current(status) is None:
        return status
    status = checkpoint_health.update(view, _read_checkpoint(view, status))
    status = _read_outputs(view, _read_inputs(view, status))
    return _read_warnings(view, status)


def _read_steps(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> FineTuneJobStatus:
    """Write the first and the last step of the attempt, and the time that its steps took."""
    from_step = entry.from_step
    if from_step is None:
        from_step = _first(report.restored_step for report in view.reports)
    to_step = max((step for step in (entry.to_step, *_reported_steps(view)) if step is not None), default=None)
    reported_at = _newest_beat_at(view)
    training_at = entry.training_at
    if training_at is None and to_step is not None and to_step > (from_step or 0):
        training_at = reported_at
    status = _tally_steps(status, entry, from_step, to_step, reported_at)
    entry = revise(entry, from_step=from_step, to_step=to_step, training_at=training_at)
    status = replace_current(status, entry)
    return status if to_step is None else revise(status, step=to_step)


def _reported_steps(view: View) -> list[int | None]:
    """Return the finished steps by the newest report of each rank and the termination message of each supervisor."""
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
    reported_at: datetime,
) -> FineTuneJobStatus:
    """Add the steps finished since the last heartbeat that was read, and the time that they took."""
    before = entry.to_step if entry.to_step is not None else from_step
    if to_step is None or before is None or to_step <= before:
        return status
    tally = status.tally
    seconds = 0.0
    # The time before an attempt's first step is loading time, and does not count.
    if entry.training_at is not None:
        since = max(entry.training_at, tally.step_time or entry.training_at)
        seconds = (reported_at - since).total_seconds()
    tally = revise(
        tally,
        trained_steps=tally.trained_steps + to_step - before,
        trained_seconds=round(tally.trained_seconds + max(0.0, seconds), 3),
        step_time=reported_at,
    )
    return revise(status, tally=tally)


def _read_checkpoint(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the newest checkpoint: among those of the newest attempt that committed one, the one with the most steps.

    Its time does not decide: it comes from the clock of the rank that wrote it.
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
        time=_time_of(newest.time, view.now),
        bytes=newest.size_bytes,
        attempt=newest.attempt,
        save_seconds=_figure(newest.durable_seconds) if newest.durable_seconds is not None else None,
        stall_seconds=_figure(newest.stall_seconds),
    )
    if newest.interval_seconds is not None:
        status = revise(status, checkpoint_interval_seconds=newest.interval_seconds)
    entry = current(status)
    assert entry is not None
    # If the attempt has failed since the checkpoint, that failure still counts.
    num_failures = 1 if entry.counts_as == CountsAs.FAILURE else 0
    tally = revise(status.tally, failures_since_checkpoint=min(num_failures, status.tally.failures_since_checkpoint))
    return revise(status, last_checkpoint=checkpoint, tally=tally)


def _read_outputs(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write every output. One that was written again replaces its earlier entry, and a finished one stays finished."""
    outputs = {(output.format, output.to, output.step): output for output in status.outputs}
    for report in view.reports:
        for begun in report.unfinished_outputs:
            known = outputs.get((begun.format, begun.to, None))
            if known is None or known.state is not OutputState.WRITTEN:
                outputs[begun.format, begun.to, None] = _unfinished(begun)
        for written in report.outputs:
            outputs[written.format, written.to, None] = OutputStatus(
                format=written.format, to=written.to, bytes=written.size_bytes, sha256=written.sha256
            )
    return revise(status, outputs=tuple(outputs.values())[-MAX_OUTPUTS:])


def _unfinished(begun: UnfinishedOutput) -> OutputStatus:
    """Return the entry of an output that is not complete. Its progress is coarse, so that the status changes rarely."""
    uploading = begun.state is OutputState.UPLOADING and begun.size_bytes
    tenth = max(1, begun.size_bytes // 10)
    return OutputStatus(
        format=begun.format,
        to=begun.to,
        state=begun.state,
        bytes=begun.size_bytes,
        delivered_bytes=begun.done_bytes // tenth * tenth if uploading else None,
        message=begun.message,
    )


def _read_inputs(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write what the job trains on. An attempt adds what it has not reported before; rank 0 reports it."""
    inputs = {each.field: each for each in status.inputs}
    for report in view.reports:
        for found in report.inputs:
            known = inputs.get(found.field)
            values = {} if known is None else known.model_dump(exclude_none=True)
            inputs[found.field] = InputStatus.model_validate(values | found.model_dump(exclude_none=True))
    return revise(status, inputs=tuple(inputs.values())[:MAX_INPUTS])


def _read_warnings(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the warnings of the ranks, each once: all current ones, and older ones up to the maximum number."""
    reported = list(dict.fromkeys(warning for report in view.reports for warning in report.warnings))[-MAX_WARNINGS:]
    if set(reported) <= set(status.warnings):
        return status
    others = [warning for warning in status.warnings if warning not in reported]
    known = [warning for warning in status.warnings if warning in reported]
    fresh = [warning for warning in reported if warning not in known]
    return revise(status, warnings=(*others, *known, *fresh)[-MAX_WARNINGS:])


def _read_figures(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write loss, speed, progress and ETA. A figure that no rank reports keeps its last value."""
    loss = _first(_figure(report.loss) for report in view.reports)
    speed = _first(_figure(report.images_per_second) for report in view.reports if report.state in AT_SPEED)
    step, total_steps = status.step, status.total_steps
    return revise(
        performance.update(view, status),
        loss=loss if loss is not None else status.loss,
        images_per_second=speed if speed is not None else status.images_per_second,
        progress=f"{min(100, 100 * step // total_steps)}%" if step is not None and total_steps else status.progress,
        eta=_eta(view, step, total_steps, speed) or status.eta,
    )


AT_SPEED = frozenset({RankState.TRAINING, RankState.SAVING, RankState.VALIDATING})


def _eta(view: View, step: int | None, total_steps: int | None, speed: float | None) -> str | None:
    if step is None or total_steps is None or not speed:
        return None
    seconds = max(0, total_steps - step) * global_batch(view.spec) / speed
    return format_seconds(seconds) if seconds < MAX_SECONDS else None


def _figure(number: float | None) -> float | None:
    """Return a number with four significant digits; None for one that JSON cannot represent."""
    return float(f"{number:.4g}") if number is not None and math.isfinite(number) else None


def _time_of(seconds: float, default: datetime) -> datetime:
    """Return the time for seconds since the epoch by another machine's clock; the default if they are out of range."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return default


def _first(values: Iterable[T | None]) -> T | None:
    """Return the first value that is not None: that of the lowest rank that has one."""
    return next((value for value in values if value is not None), None)


POLICY = Policy("progress", decide=read)
