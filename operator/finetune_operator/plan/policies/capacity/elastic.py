"""The number of pods of an attempt: maxNodes if enough nodes are available, otherwise fewer, but at least minNodes.

Shrinking ends an attempt that has waited for nodes for `recovery.shrinkAfter`; those of its pods that have a node form
the next gang. `regroup` grows it again: standby pods show that nodes are available. The global batch is always that of
maxNodes, so the size changes neither the order of the samples nor the learning rate.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.duration import parse_seconds
from finetune_operator.api.job import FineTuneJobSpec, SchedulingMode
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.manifests import num_nodes
from finetune_operator.plan.model import admission, gangs
from finetune_operator.plan.model.closing import close
from finetune_operator.plan.model.ledger import current, open_attempt
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.view import View

SHRINK_AFTER = timedelta(minutes=5)
"""Default of `recovery.shrinkAfter`: an autoscaler adds a node within this time, if it can. A gang that receives its
nodes together does not wait for longer than it may hold them; standby pods go on to request the others."""


def is_elastic(spec: FineTuneJobSpec) -> bool:
    """Return whether the number of nodes may change."""
    return (spec.topology.min_nodes or num_nodes(spec)) < num_nodes(spec)


def next_size(view: View, status: FineTuneJobStatus, num_kept: int) -> int:
    """Return the number of pods of the next attempt, given how many pods could be kept for it."""
    full, entry = largest(view), current(status)
    if not is_elastic(view.spec) or entry is None:
        return full
    wanted = entry.next_nodes or entry.nodes or full
    if entry.reason in (Reason.SUSPENDED, Reason.EVICTED_BY_QUEUE, Reason.GANG_RELEASED):
        # The available nodes may have changed since.
        wanted = full
    elif _has_waited(view, entry) and num_kept >= (view.spec.topology.min_nodes or full):
        # The survivors' emergency save has already taken as long as the job waits for a replacement.
        wanted = num_kept
    return min(full, max(view.spec.topology.min_nodes or full, wanted, num_kept))


def largest(view: View) -> int:
    """Return the largest number of pods that the job may have now: its queue may have reserved quota for fewer."""
    full, limit = num_nodes(view.spec), admission.limit(view)
    return full if limit is None else min(full, limit)


def shrink(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt that has waited for nodes for too long, if those that it has are enough."""
    entry = open_attempt(view, status)
    due = shrink_at(view, entry) if entry is not None else None
    num_placed, least = len(gangs.placed(view)), view.spec.topology.min_nodes or view.num_nodes
    if due is None or view.now < due or not least <= num_placed < view.num_nodes:
        return status
    message = f"{num_placed} of {view.num_nodes} pods have a node"
    return close(view, status, Reason.SHRUNK, next_nodes=num_placed, message=message)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the wait for nodes ends."""
    entry = open_attempt(view, status)
    return shrink_at(view, entry) if entry is not None else None


def shrink_at(view: View, entry: AttemptStatus) -> datetime | None:
    """Return when to accept fewer nodes; None if all pods have a node, or the number is fixed."""
    if not is_elastic(view.spec) or entry.seconds.queueing is not None or len(gangs.placed(view)) == view.num_nodes:
        return None
    ended = view.job.status.attempts[-2] if len(view.job.status.attempts) > 1 else None
    since = _missing_since(ended) if ended is not None else None
    return (since or entry.started_at) + _shrink_after(view)


def _missing_since(ended: AttemptStatus) -> datetime | None:
    """Return when the attempt lost its capacity; None if it ended for another reason."""
    return ended.ended_at if ended.counts_as == CountsAs.PREEMPTION else None


def _has_waited(view: View, ended: AttemptStatus) -> bool:
    since = _missing_since(ended)
    return since is not None and view.now >= since + _shrink_after(view)


def _shrink_after(view: View) -> timedelta:
    value = view.spec.recovery.shrink_after
    if value:
        return timedelta(seconds=parse_seconds(value))
    entry = current(view.job.status)
    if entry is None or gangs.mode_of(entry) is SchedulingMode.NONE:
        return SHRINK_AFTER
    return timedelta(seconds=view.settings.gang_hold_seconds)


POLICY = Policy("elastic", decide=shrink, wake=wake)
