"""Use spot nodes first, other nodes after `recovery.spot.fallbackAfter`; `regroup` returns to spot nodes.

Falling back ends an attempt that has waited for spot nodes for that long. New pods of the next attempt accept any
node and prefer spot ones; pods that have a node are kept.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.duration import parse_seconds
from finetune_operator.api.job import FineTuneJobSpec
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptStatus, Capacity, FineTuneJobStatus
from finetune_operator.plan.model import gangs
from finetune_operator.plan.model.closing import close
from finetune_operator.plan.model.ledger import RELEASED, current, open_attempt, waiting_since
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.view import View


def fallback_after(spec: FineTuneJobSpec) -> timedelta | None:
    """Return how long to wait for spot nodes; None: no limit, or the job does not request spot nodes."""
    spot = spec.recovery.spot
    value = spot.fallback_after if spot is not None else None
    return timedelta(seconds=parse_seconds(value)) if value else None


def fall_back(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt that has waited for spot nodes for too long."""
    entry = open_attempt(view, status)
    due = fallback_at(view, entry) if entry is not None else None
    if due is None or view.now < due:
        return status
    message = f"{len(gangs.placed(view))} of {view.num_nodes} pods have a spot node"
    return close(view, status, Reason.FELL_BACK, message=message)


def capacity_of_next(status: FineTuneJobStatus) -> Capacity | None:
    """Return which nodes the new pods of the next attempt accept."""
    entry = current(status)
    if entry is None:
        return None
    return Capacity.ANY if entry.reason == Reason.FELL_BACK else entry.capacity if entry.reason in RELEASED else None


def fallback_at(view: View, entry: AttemptStatus) -> datetime | None:
    """Return when to accept any node; None if all pods have a node, or already accept any."""
    after = fallback_after(view.spec)
    if after is None or entry.capacity is Capacity.ANY or entry.seconds.queueing is not None:
        return None
    return waiting_since(view.job.status, entry) + after if len(gangs.placed(view)) < view.num_nodes else None


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the wait for spot nodes ends."""
    entry = open_attempt(view, status)
    return fallback_at(view, entry) if entry is not None else None


POLICY = Policy("spot", decide=fall_back, wake=wake)
