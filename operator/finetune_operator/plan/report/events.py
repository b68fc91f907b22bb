"""Kubernetes events of a reconcile: the difference between the status before and after it.

Events follow from a status that was written, so each is emitted once, even after a restart or a repeated reconcile.
"""

from __future__ import annotations

from finetune_contract.heartbeat import OutputState
from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model.conditions import find
from finetune_operator.plan.model.explain import count, explain_end
from finetune_operator.plan.model.types import Event

REPORTED_BY_PHASE = frozenset({Reason.FINISHED, Reason.DEADLINE_EXCEEDED, Reason.SUSPENDED})
"""Ends of an attempt without a separate event: the change of the job's phase has one."""


def build_events(old: FineTuneJobStatus, new: FineTuneJobStatus) -> tuple[Event, ...]:
    """Return the events of one reconcile, in chronological order."""
    return (
        *_acceptance(old, new),
        *_attempts(old, new),
        *_memory(old, new),
        *_checkpoint(old, new),
        *_warnings(old, new),
        *_became_true(ConditionType.NOTICE_TOO_SHORT, old, new, warning=True),
        *_became_true(ConditionType.PODS_OUTDATED, old, new, warning=False),
        *_outputs(old, new),
        *_end(old, new),
    )


def _acceptance(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    before, after = find(old, ConditionType.ACCEPTED), find(new, ConditionType.ACCEPTED)
    if after is None or (before is not None and (before.status, before.message) == (after.status, after.message)):
        return []
    return [Event(after.reason, after.message, warning=after.status != "True")]


def _attempts(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    """Return events for each attempt's start, its end, and its first step after another attempt's end."""
    known = {entry.attempt: entry for entry in old.attempts}
    events = []
    for previous, entry in zip((None, *new.attempts), new.attempts, strict=False):
        before = known.get(entry.attempt)
        if before is None:
            events.append(Event(Reason.ATTEMPT_STARTED, f"attempt {entry.attempt} started"))
        if previous is not None and entry.training_at is not None and (before is None or before.training_at is None):
            events.append(_recovered(previous, entry))
        events += _ending(before, entry)
    return events


def _ending(before: AttemptStatus | None, entry: AttemptStatus) -> list[Event]:
    """Return the event of an attempt's end, and that of its cause, which may become certain later."""
    if entry.reason is None:
        is_new = entry.ended_at is not None and (before is None or before.ended_at is None)
        at = f" at step {entry.to_step}" if entry.to_step is not None else ""
        message = f"attempt {entry.attempt} ended{at}; its cause is not certain yet"
        return [Event(Reason.ATTEMPT_ENDED, message)] if is_new else []
    if entry.reason in REPORTED_BY_PHASE or (before is not None and before.reason is not None):
        return []
    return [Event(entry.reason, explain_end(entry), warning=entry.counts_as in (CountsAs.FAILURE, CountsAs.OUTAGE))]


def _recovered(previous: AttemptStatus, entry: AttemptStatus) -> Event:
    parts = [
        f"attempt {entry.attempt} resumed at step {entry.from_step or 0}",
        f"{count(previous.lost_steps or 0, 'step')} lost",
    ]
    if previous.ended_at is not None and entry.training_at is not None:
        parts.append(f"{(entry.training_at - previous.ended_at).total_seconds():.1f} s to recover")
    return Event(Reason.RECOVERED, "; ".join(parts))


def _memory(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    if new.memory is None or new.memory == old.memory or not new.attempts:
        return []
    before = new.attempts[-1].memory
    message = f"a pod exceeded its memory; the memory of each pod is raised from {before} to {new.memory}"
    return [Event(Reason.MEMORY_RAISED, message)]


def _checkpoint(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    """Return an event for the first checkpoint only: a long job commits hundreds."""
    if old.last_checkpoint is not None or new.last_checkpoint is None:
        return []
    return [Event(Reason.CHECKPOINT_COMMITTED, f"first checkpoint committed at step {new.last_checkpoint.step}")]


def _warnings(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    fresh = [warning for warning in new.warnings if warning not in old.warnings]
    return [Event(Reason.TRAINER_WARNING, warning, warning=True) for warning in fresh]


def _became_true(kind: ConditionType, old: FineTuneJobStatus, new: FineTuneJobStatus, *, warning: bool) -> list[Event]:
    before, after = (find(status, kind) for status in (old, new))
    if after is None or after.status != "True" or (before is not None and before.status == "True"):
        return []
    return [Event(after.reason, after.message, warning=warning)]


def _outputs(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    fresh = [output for output in new.outputs if output not in old.outputs]
    written = [output for output in fresh if output.state is OutputState.WRITTEN]
    failed = [output for output in fresh if output.state is OutputState.FAILED]
    return [
        *(Event(Reason.OUTPUT_WRITTEN, f"{output.format} output written to {output.to}") for output in written),
        *(
            Event(Reason.OUTPUT_FAILED, f"{output.format} output not delivered: {output.message}", warning=True)
            for output in failed
        ),
    ]


def _end(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    ends = (Phase.SUCCEEDED, Phase.FAILED, Phase.SUSPENDED)
    if new.phase == old.phase or new.phase not in ends:
        return []
    return [Event(new.reason or new.phase.value, new.message or "", warning=new.phase is Phase.FAILED)]
