"""Release the quota of an incomplete gang: the cluster admits some of its pods and refuses the others.

A gang that cannot start must not keep nodes and quota from jobs that could. Its pods are deleted after
`Settings.quota_hold_seconds`, and all of them are requested again later (see `backoff`). An elastic job that has
enough pods continues with them instead (see `elastic`).
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model import gangs
from finetune_operator.plan.model.backoff import jitter
from finetune_operator.plan.model.closing import close
from finetune_operator.plan.model.ledger import open_attempt
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.view import View
from finetune_operator.plan.policies.capacity import elastic


def release(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt whose gang has been incomplete for too long."""
    due = wake(view, status)
    refusal = view.observed.refusal
    if due is None or refusal is None or view.now < due:
        return status
    message = f"{describe_admission(view)}; {refusal.message}"
    return close(view, status, Reason.QUOTA_RELEASED, message=message)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the wait for the missing pods ends."""
    entry = open_attempt(view, status)
    return release_at(view, entry) if entry is not None else None


def release_at(view: View, entry: AttemptStatus) -> datetime | None:
    """Return when to release the quota; None: no pod is refused, none would be released, or the gang can shrink."""
    hold = view.settings.quota_hold_seconds
    if view.observed.refusal is None or entry.gang_complete or not hold or not 0 < len(view.pods) < view.num_nodes:
        return None
    least = view.spec.topology.min_nodes or view.num_nodes
    if elastic.is_elastic(view.spec) and len(gangs.placed(view)) >= least:
        return None
    # The jitter is different for each job: gangs that block each other must not release at the same time.
    return entry.started_at + timedelta(seconds=hold) * jitter(view.job.metadata.uid, entry.attempt)


def describe_admission(view: View) -> str:
    """Return how many pods of the gang exist."""
    return f"the cluster admits {len(view.pods)} of {view.num_nodes} pods"


POLICY = Policy("quota", decide=release, wake=wake)
