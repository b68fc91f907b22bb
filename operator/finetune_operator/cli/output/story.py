"""What happened between two passes, as lines for a person. Pure; shared by the plain and the live output."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_operator.api.job import AttemptStatus, FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.cli.output import figures
from finetune_operator.plan.report.explain import explain_end

TOLD = frozenset(
    {
        *(Reason.INVALID_SPEC, Reason.NOT_SUPPORTED, Reason.QUEUED, Reason.UNSCHEDULABLE, Reason.IMAGE_PULL),
        *(Reason.CONTAINER_CONFIG, Reason.BACK_OFF, Reason.LOADING, Reason.CACHING, Reason.RESTORING),
        *(Reason.VALIDATING, Reason.EXPORTING, Reason.SILENT),
    }
)
"""Reasons that are worth a line; of the others, other lines speak."""


def happened(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[str]:
    """Lines for all that is new, in the order in which it happened; progress and checkpoints aside."""
    yield from _attempts(old, new)
    yield from _phase(old, new)
    yield from (f"warning: {warning}" for warning in new.warnings if warning not in old.warnings)
    for output in new.outputs:
        if output not in old.outputs:
            yield f"{output.format} written to {output.to} ({figures.size(output.bytes)})"


def committed(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[str]:
    """A line for a new checkpoint."""
    checkpoint = new.last_checkpoint
    if checkpoint is not None and checkpoint != old.last_checkpoint:
        yield f"checkpoint of step {checkpoint.step} committed ({figures.size(checkpoint.bytes)})"


def progress(status: FineTuneJobStatus) -> str:
    """Step, loss, speed and time left in one line."""
    parts = [f"step {figures.steps(status)}" + (f" ({status.progress})" if status.progress else "")]
    if status.loss is not None:
        parts.append(f"loss {figures.loss(status.loss)}")
    if status.images_per_second is not None:
        parts.append(figures.rate(status.images_per_second))
    if status.eta is not None:
        parts.append(f"ETA {status.eta}")
    return ", ".join(parts)


SILENT_ENDS = frozenset({None, Reason.FINISHED, Reason.SUSPENDED})
"""Ends of attempts that other lines speak of."""


def _attempts(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[str]:
    known = {entry.attempt: entry for entry in old.attempts}
    for entry in new.attempts:
        before = known.get(entry.attempt)
        if before is None and entry.attempt > 1:
            yield f"attempt {entry.attempt} begins"
        if entry.from_step and (before is None or before.from_step is None):
            yield f"attempt {entry.attempt} goes on at step {entry.from_step}"
        if entry.reason not in SILENT_ENDS and (before is None or before.reason is None):
            yield _end(entry)


def _end(entry: AttemptStatus) -> str:
    counted = f" It counts as a {entry.counts_as.lower()}." if entry.counts_as else ""
    return f"{explain_end(entry)}{counted}"


def _phase(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[str]:
    if new.phase is None or new.reason not in TOLD or (old.phase, old.reason) == (new.phase, new.reason):
        return
    message = new.message or ""
    if new.reason == Reason.BACK_OFF:
        # Why the attempt ended has had its line.
        message = message.rpartition("; ")[2]
    yield f"{new.phase}: {'loading' if new.reason == Reason.LOADING else message}"
