"""Describes the changes between two statuses in lines of text. Pure; used by the plain and the live view."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_contract.heartbeat import OutputState
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.cli.output import formatting
from finetune_operator.plan.model.explain import explain_end

ANNOUNCED_REASONS = frozenset(
    {
        *(Reason.INVALID_SPEC, Reason.NOT_SUPPORTED, Reason.QUEUED, Reason.UNSCHEDULABLE, Reason.IMAGE_PULL),
        *(Reason.CONTAINER_CONFIG, Reason.BACK_OFF, Reason.LOADING, Reason.CACHING, Reason.RESTORING),
        *(Reason.VALIDATING, Reason.EXPORTING, Reason.SILENT),
    }
)
"""Reasons that get a separate line. Other lines cover the other reasons."""


def describe_changes(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[str]:
    """Yield a line for each change in the order of events, except for progress and checkpoints."""
    yield from _attempts(old, new)
    yield from _phase(old, new)
    yield from (f"warning: {warning}" for warning in new.warnings if warning not in old.warnings)
    for output in new.outputs:
        if output not in old.outputs and output.state is OutputState.WRITTEN:
            yield f"{output.format} written to {output.to} ({formatting.format_size(output.bytes)})"


def describe_commit(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[str]:
    """Yield a line for a new checkpoint."""
    checkpoint = new.last_checkpoint
    if checkpoint is not None and checkpoint != old.last_checkpoint:
        yield f"checkpoint of step {checkpoint.step} committed ({formatting.format_size(checkpoint.bytes)})"


def format_progress(status: FineTuneJobStatus) -> str:
    """Return step, loss, speed and remaining time in one line."""
    parts = [f"step {formatting.format_steps(status)}" + (f" ({status.progress})" if status.progress else "")]
    if status.loss is not None:
        parts.append(f"loss {formatting.format_loss(status.loss)}")
    if status.images_per_second is not None:
        parts.append(formatting.format_rate(status.images_per_second))
    if status.eta is not None:
        parts.append(f"ETA {status.eta}")
    return ", ".join(parts)


UNANNOUNCED_ENDS = frozenset({None, Reason.FINISHED, Reason.SUSPENDED})
"""Reasons of an attempt's end that other lines cover."""


def _attempts(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[str]:
    known = {entry.attempt: entry for entry in old.attempts}
    for entry in new.attempts:
        before = known.get(entry.attempt)
        if before is None and entry.attempt > 1:
            yield f"attempt {entry.attempt} begins"
        if entry.from_step and (before is None or before.from_step is None):
            yield f"attempt {entry.attempt} resumes from step {entry.from_step}"
        if entry.reason not in UNANNOUNCED_ENDS and (before is None or before.reason is None):
            yield _end(entry)


def _end(entry: AttemptStatus) -> str:
    article = "an" if entry.counts_as == CountsAs.OUTAGE else "a"
    counted = f" It counts as {article} {entry.counts_as.lower()}." if entry.counts_as else ""
    return f"{explain_end(entry)}{counted}"


def _phase(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[str]:
    if new.phase is None or new.reason not in ANNOUNCED_REASONS or (old.phase, old.reason) == (new.phase, new.reason):
        return
    message = new.message or ""
    if new.reason == Reason.BACK_OFF and new.attempts:
        # Another line has the reason for the attempt's end.
        message = message.removeprefix(explain_end(new.attempts[-1])).strip()
    yield f"{new.phase}: {'loading' if new.reason == Reason.LOADING else message}"
