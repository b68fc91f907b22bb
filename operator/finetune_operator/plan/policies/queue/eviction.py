"""End an attempt whose pods the queue no longer admits: the ranks save, the pods leave, then the quota is released.

The end counts as a preemption. Deleting the pods is itself the notice, as for a suspension: all ranks have
`recovery.noticeSeconds` to finish a step and save it. The next attempt begins with the next admission.
"""

from __future__ import annotations

from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model import admission
from finetune_operator.plan.model.closing import close
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished


def evict(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End the open attempt if the queue has withdrawn its admission."""
    if is_finished(status) or admission.may_run(view):
        return status
    return close(view, status, Reason.EVICTED_BY_QUEUE, message=_why(view))


def _why(view: View) -> str:
    workload = admission.active(view)
    if workload is None:
        return "its Workload was deleted"
    evicted = admission.condition(workload, admission.EVICTED)
    if evicted is not None and evicted.status == "True":
        return f"{evicted.reason}: {evicted.message}"
    return admission.describe_wait(view)


def count_wait(view: View, before: FineTuneJobStatus, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Return the status of an attempt that begins, without the time that the job spent in the queue before it."""
    ended = current(before)
    if ended is None or ended.reason != Reason.EVICTED_BY_QUEUE or ended.ended_at is None:
        return status
    seconds = max(0.0, (view.now - ended.ended_at).total_seconds())
    tally = revise(status.tally, suspended_seconds=round(status.tally.suspended_seconds + seconds, 3))
    return revise(status, tally=tally)


POLICY = Policy("queue-eviction", decide=evict)
