"""What a job's queue has decided: the Workload that counts, and what it allows. Pure; read by many policies.

A job without a queue is always admitted. With a queue, no pod exists before a Workload is admitted.
"""

from __future__ import annotations

from finetune_operator.api import kueue
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.manifests.workload import hash_request
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.types import ObservedWorkload, WorkloadCondition
from finetune_operator.plan.model.view import View

ADMITTED, EVICTED, FINISHED = "Admitted", "Evicted", "Finished"
QUOTA_RESERVED, REQUEUED, PODS_READY = "QuotaReserved", "Requeued", "PodsReady"


def uses_queue(view: View) -> bool:
    """Return whether the job waits for a queue.

    The label of Kueue counts only where the operator uses Kueue: jobs of an older operator may have it.
    """
    by_label = view.settings.kueue and kueue.queue_of(view.job) is not None
    return view.spec.queue_name is not None or by_label


def _is_served(view: View) -> bool:
    return view.settings.kueue and view.observed.queues_served


def condition(workload: ObservedWorkload, kind: str) -> WorkloadCondition | None:
    """Return a condition of a Workload; None if there is none."""
    return next((each for each in workload.conditions if each.type == kind), None)


def is_true(workload: ObservedWorkload, kind: str) -> bool:
    """Return whether a condition is True."""
    found = condition(workload, kind)
    return found is not None and found.status == "True"


def is_admitted(workload: ObservedWorkload) -> bool:
    """Return whether pods of a Workload may exist: it is admitted and not evicted since."""
    ended = not workload.active or is_true(workload, EVICTED) or is_true(workload, FINISHED)
    return is_true(workload, ADMITTED) and workload.num_admitted is not None and not ended


def unfinished(view: View) -> tuple[ObservedWorkload, ...]:
    """Return the Workloads that are not finished, oldest first."""
    return tuple(each for each in view.observed.workloads if not is_true(each, FINISHED))


def active(view: View) -> ObservedWorkload | None:
    """Return the Workload that the pods belong to: the newest admitted one, or else the oldest unfinished one."""
    candidates = unfinished(view)
    admitted = [each for each in candidates if is_admitted(each)]
    return admitted[-1] if admitted else next(iter(candidates), None)


def replacement(view: View) -> ObservedWorkload | None:
    """Return the Workload that waits to replace the admitted one with more pods; None if there is none."""
    now = active(view)
    if now is None:
        return None
    key = f"{view.job.metadata.namespace}/{now.name}"
    return next((each for each in unfinished(view) if each.replaces == key and not is_admitted(each)), None)


def may_run(view: View) -> bool:
    """Return whether pods of the job may exist."""
    if not uses_queue(view) or not _is_served(view):
        # Without Kueue nobody can withdraw an admission.
        return True
    workload = active(view)
    return workload is not None and is_admitted(workload)


def may_create(view: View) -> bool:
    """Return whether pods may be created: they are admitted, and it is known what the queue adds to them.

    After an edit, a job without pods gives its admission back at once, even if its attempt is open.
    """
    if not uses_queue(view):
        return True
    workload = active(view)
    if workload is None or (is_outdated(view, workload) and not view.raw.pods):
        return False
    return _is_served(view) and is_admitted(workload) and workload.update is not None


def limit(view: View) -> int | None:
    """Return the number of pods for which the queue has reserved quota; None: the job has no queue or no quota."""
    workload = active(view) if uses_queue(view) else None
    return workload.num_admitted if workload is not None else None


def is_outdated(view: View, workload: ObservedWorkload) -> bool:
    """Return whether the job was edited since it requested its pods. A prebuilt Workload is never outdated."""
    if kueue.PREBUILT_LABEL in view.job.metadata.labels:
        return False
    return workload.request is not None and workload.request != hash_request(view.job)


def must_ask_again(view: View) -> bool:
    """Return whether an edit of the job requires another admission before the next attempt."""
    workload = active(view) if uses_queue(view) else None
    return workload is not None and is_outdated(view, workload)


def is_waiting_again(status: FineTuneJobStatus) -> bool:
    """Return whether the queue evicted the newest attempt, and the next one has not begun."""
    entry = current(status)
    return entry is not None and entry.reason == Reason.EVICTED_BY_QUEUE


def describe_wait(view: View) -> str:
    """Return what the job waits for, in Kueue's words."""
    queue, workload = kueue.queue_of(view.job), active(view)
    if not _is_served(view):
        wait = "the operator cannot use Kueue now; see kueue.enabled in the values of its chart"
    elif workload is None:
        wait = "the request is being created"
    else:
        wait = _describe(workload)
    return f"queue {queue}: {wait}"


def _describe(workload: ObservedWorkload) -> str:
    """Return what a Workload waits for."""
    if not workload.active:
        evicted = condition(workload, EVICTED)
        why = f" ({evicted.message})" if evicted is not None and evicted.message else ""
        return (
            f"Kueue has deactivated the Workload {workload.name}{why}; fix the cause, then set its spec.active to true"
        )
    if is_admitted(workload):
        return "admitted"
    for kind, status in ((QUOTA_RESERVED, "False"), (EVICTED, "True"), (ADMITTED, "False")):
        found = condition(workload, kind)
        if found is not None and found.message and found.status == status:
            return f"{found.reason}: {found.message}"
    if is_true(workload, QUOTA_RESERVED):
        return "quota is reserved; waiting for the admission checks"
    return f"waiting for Kueue; does the LocalQueue {workload.queue} exist in this namespace?"
