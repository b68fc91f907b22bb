"""Spot nodes first, others after `recovery.spot.fallbackAfter`; back to spot is `regroup`'s.

Falling back ends an attempt that has waited for room for so long. The next one's new pods take any node, spot ones
where there are some; pods that have a node are kept.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.duration import parse_seconds
from finetune_operator.api.job import AttemptStatus, Capacity, FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.ledger import current, open_entry, replace_current
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies import elastic
from finetune_operator.plan.policies.endings import close


def fallback_after(spec: FineTuneJobSpec) -> timedelta | None:
    """How long to wait for spot nodes; None: for ever, or there is nothing to wait for."""
    spot = spec.recovery.spot
    asked = spot.fallback_after if spot is not None else None
    return timedelta(seconds=parse_seconds(asked)) if asked else None


def fall_back(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt that has waited for spot nodes for too long."""
    entry = open_entry(status)
    if entry is None or entry.attempt != view.attempt or is_finished(status):
        return status
    due = fallback_at(view, entry)
    if due is None or view.now < due:
        return status
    status = close(status, Reason.FELL_BACK, view.now)
    entry = current(status)
    assert entry is not None
    words = f"{len(elastic.placed(view))} of {view.num_nodes} pods have a spot node"
    return replace_current(status, revise(entry, message=words))


def of_next(status: FineTuneJobStatus) -> Capacity | None:
    """What the new pods of the next attempt ask for."""
    entry = current(status)
    return Capacity.ANY if entry is not None and entry.reason == Reason.FELL_BACK else None


def fallback_at(view: View, entry: AttemptStatus) -> datetime | None:
    """When any node will do; None where all pods have one, or may take any already."""
    after = fallback_after(view.spec)
    if after is None or entry.capacity is Capacity.ANY or entry.seconds.queueing is not None:
        return None
    return entry.started_at + after if len(elastic.placed(view)) < view.num_nodes else None


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When waiting for spot nodes has taken long enough."""
    entry = open_entry(status)
    if entry is None or entry.attempt != view.attempt or is_finished(status):
        return None
    return fallback_at(view, entry)
