"""When an attempt has ended: at the first sign of it, and with a cause as soon as one can be believed.

Called once a pass. A sign that is a mere consequence (a rank that lost its peer) ends the attempt at once, but is
written as its cause only after `Settings.cause_seconds`, or when all pods have ended: the peer's own end may be on
its way. The counters rise with the cause, so each end counts once.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.job import AttemptStatus, FineTuneJobStatus, TallyStatus
from finetune_operator.api.names import pod_name
from finetune_operator.api.reasons import REASONS, CountsAs, Reason
from finetune_operator.plan.model.causes import BY_THE_CLUSTER, Cause, find_cause, find_silent
from finetune_operator.plan.model.ledger import current, replace_current
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies.cleanup import SAVED_FOR


def see_end(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Mark the attempt as ended when a sign of it shows, and write the cause once it is certain enough."""
    entry = current(status)
    if entry is not None and entry.reason in SAVED_FOR and entry.attempt == view.attempt:
        return _see_loss(view, status)
    if entry is None or entry.reason is not None or is_finished(status):
        return status
    cause = find_cause(view, entry.gang_complete)
    if cause is None and entry.ended_at is None:
        return status
    if entry.ended_at is None:
        entry = revise(entry, ended_at=view.now)
        status = replace_current(status, entry)
    if cause is None:
        # The pod that gave the sign is gone from a gang that was never complete.
        cause = Cause(Reason.POD_LOST, rank=0, pod=pod_name(view.job.metadata.name, view.attempt, 0))
    if cause.consequence and view.now < believe_at(entry, view) and not view.all_ended():
        return status
    if cause.consequence and entry.ended_at is not None and not view.all_ended():
        # Every supervisor tells of its rank's end at once; one that has not is the peer that was lost.
        cause = find_silent(view, entry.ended_at) or cause
    return settle(status, cause)


def _see_loss(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """A machine may be lost while its gang saves for the sake of better capacity: that is a loss like any other."""
    cause = find_cause(view, gang_complete=False)
    lost = cause is not None and not cause.consequence and cause.reason in BY_THE_CLUSTER and not is_finished(status)
    return settle(status, cause) if cause is not None and lost else status


def settle(status: FineTuneJobStatus, cause: Cause) -> FineTuneJobStatus:
    """Write why the newest attempt ended, and count it."""
    entry = current(status)
    assert entry is not None
    settled = revise(
        entry,
        reason=cause.reason.value,
        counts_as=cause.counts_as.value if cause.counts_as else None,
        rank=cause.rank,
        pod=cause.pod,
        node=cause.node,
        exit_code=cause.exit_code,
        message=cause.last_words or None,
        # A fabric's failure may turn out to be a machine's.
        pod_nodes=entry.pod_nodes if cause.reason is Reason.FABRIC_ERROR else None,
    )
    return _count(replace_current(status, settled), cause.counts_as)


def close(status: FineTuneJobStatus, reason: Reason, now: datetime) -> FineTuneJobStatus:
    """End the newest attempt for a reason that is no pod's, unless it has ended for another one."""
    entry = current(status)
    if entry is None or entry.reason is not None:
        return status
    counts_as = REASONS[reason].counts_as
    closed = revise(
        entry,
        ended_at=entry.ended_at or now,
        reason=reason.value,
        counts_as=counts_as.value if counts_as else None,
        pod_nodes=None,
    )
    return _count(replace_current(status, closed), counts_as)


def _count(status: FineTuneJobStatus, counts_as: CountsAs | None) -> FineTuneJobStatus:
    if counts_as is CountsAs.PREEMPTION:
        return revise(status, preemptions=status.preemptions + 1)
    if counts_as is CountsAs.FAILURE:
        return revise(status, failures=status.failures + 1, tally=_tally_failure(status))
    return status


def _tally_failure(status: FineTuneJobStatus) -> TallyStatus:
    """A failure more, since the checkpoint and at its step. An attempt that did not begin to train is at no step."""
    entry, tally = current(status), status.tally
    assert entry is not None
    same = entry.to_step is not None and entry.to_step == tally.failed_step
    return revise(
        tally,
        failures_since_checkpoint=tally.failures_since_checkpoint + 1,
        failed_step=entry.to_step,
        failures_at_step=tally.failures_at_step + 1 if same else 1,
    )


def believe_at(entry: AttemptStatus, view: View) -> datetime:
    """When a mere consequence is taken for the cause."""
    return (entry.ended_at or view.now) + timedelta(seconds=view.settings.cause_seconds)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When an end that has no cause yet must be looked at again."""
    entry = current(status)
    if entry is None or entry.ended_at is None or entry.reason is not None:
        return None
    return believe_at(entry, view)
