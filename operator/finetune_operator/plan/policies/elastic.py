"""How many pods an attempt has: maxNodes where there is room, fewer, but minNodes at least, where there is none.

Shrinking ends an attempt that has waited for room for `recovery.shrinkAfter`; those of its pods that have a node are
the next one's gang. Growing back is `regroup`'s: pods that stand by show that there is room again. The global batch
is that of maxNodes whatever the size, so neither the order of the samples nor the learning rate changes.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.duration import parse_seconds
from finetune_operator.api.job import AttemptStatus, FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.manifests import num_nodes
from finetune_operator.plan.model.ledger import current, open_entry, replace_current
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.types import ObservedPod
from finetune_operator.plan.model.view import View, has_ended, is_finished
from finetune_operator.plan.policies.endings import close

SHRINK_AFTER = timedelta(minutes=5)
"""An autoscaler brings a node within this time, if it can."""


def is_elastic(spec: FineTuneJobSpec) -> bool:
    """Whether the number of nodes may change."""
    return (spec.topology.min_nodes or num_nodes(spec)) < num_nodes(spec)


def next_size(view: View, status: FineTuneJobStatus, num_kept: int) -> int:
    """Number of pods of the next attempt, of which so many could be kept."""
    full, entry = num_nodes(view.spec), current(status)
    if not is_elastic(view.spec) or entry is None:
        return full
    wanted = entry.next_nodes or entry.nodes or full
    if entry.reason == Reason.SUSPENDED:
        # Much may have changed meanwhile.
        wanted = full
    elif _has_waited(view, entry) and num_kept >= (view.spec.topology.min_nodes or full):
        # The survivors' last save took as long as there is patience for others.
        wanted = num_kept
    return min(full, max(view.spec.topology.min_nodes or full, wanted, num_kept))


def shrink(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt that has waited for room for too long, where fewer nodes will do."""
    entry = open_entry(status)
    if entry is None or entry.attempt != view.attempt or is_finished(status):
        return status
    due, num_placed = shrink_at(view, entry), len(placed(view))
    least = view.spec.topology.min_nodes or view.num_nodes
    if due is None or view.now < due or not least <= num_placed < view.num_nodes:
        return status
    status = close(status, Reason.SHRUNK, view.now)
    entry = current(status)
    assert entry is not None
    words = f"{num_placed} of {view.num_nodes} pods have a node"
    return replace_current(status, revise(entry, next_nodes=num_placed, message=words))


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When waiting for room has taken long enough."""
    entry = open_entry(status)
    if entry is None or entry.attempt != view.attempt or is_finished(status):
        return None
    return shrink_at(view, entry)


def shrink_at(view: View, entry: AttemptStatus) -> datetime | None:
    """When fewer nodes will do; None where all pods have one, or the number is fixed."""
    if not is_elastic(view.spec) or entry.seconds.queueing is not None or len(placed(view)) == view.num_nodes:
        return None
    ended = view.job.status.attempts[-2] if len(view.job.status.attempts) > 1 else None
    since = _missing_since(ended) if ended is not None else None
    return (since or entry.started_at) + _patience(view.spec)


def _missing_since(ended: AttemptStatus) -> datetime | None:
    """When capacity was lost, where that ended an attempt: from then on it is missing."""
    return ended.ended_at if ended.counts_as == CountsAs.PREEMPTION else None


def _has_waited(view: View, ended: AttemptStatus) -> bool:
    since = _missing_since(ended)
    return since is not None and view.now >= since + _patience(view.spec)


def _patience(spec: FineTuneJobSpec) -> timedelta:
    asked = spec.recovery.shrink_after
    return timedelta(seconds=parse_seconds(asked)) if asked else SHRINK_AFTER


def placed(view: View) -> list[ObservedPod]:
    """Pods of the attempt that have a node, and are not about to leave it."""
    pods = (pod for pod in view.pods.values() if pod.node is not None and not has_ended(pod))
    return [pod for pod in pods if pod.deleted_at is None and pod.disruption is None]
