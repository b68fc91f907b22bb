"""Standby pods: pods without a rank that wait for the next attempt. They show when better capacity is available.

A job that runs on fewer nodes than requested, or on nodes other than spot, keeps requesting the better ones with
standby pods. These have the same requirements as its other pods, so the scheduler and any autoscaler treat them alike.
As soon as a standby pod runs, with its image pulled, and its heartbeat arrives, `regroup` forms a new gang with it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.names import MAX_NODES
from finetune_operator.api.status import Capacity, FineTuneJobStatus
from finetune_operator.plan.model.causes import is_capacity_end
from finetune_operator.plan.model.ledger import open_attempt, open_entry
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import DeletePod, ObservedPod
from finetune_operator.plan.model.view import View, earliest
from finetune_operator.plan.policies import in_place
from finetune_operator.plan.policies.capacity import elastic, spot

REPLACE_AFTER = timedelta(minutes=1)
"""Minimum age at which a standby pod that the cluster ended is replaced, so that refused ones do not form a loop."""


def wanted(view: View, status: FineTuneJobStatus) -> dict[int, Capacity | None]:
    """Return the numbers of the wanted standby pods, and which nodes each accepts. Empty unless the attempt trains."""
    entry = open_attempt(view, status)
    if entry is None or entry.training_at is None:
        return {}
    if not in_place.is_possible(view) or view.spec.suspend:
        return {}
    num_missing = max(0, elastic.largest(view) - view.num_nodes) if elastic.is_elastic(view.spec) else 0
    num_wanted = num_missing + (len(fallen_back(view)) if view.spec.recovery.spot is not None else 0)
    due = _fallback_at(view, status)
    accept_any = due is not None and view.now >= due
    numbers = range(view.num_nodes, min(view.num_nodes + num_wanted, MAX_NODES))
    return {
        number: Capacity.ANY if accept_any and number < view.num_nodes + num_missing else None for number in numbers
    }


def fallen_back(view: View) -> list[ObservedPod]:
    """Return the pods of the attempt that accept nodes other than spot."""
    return [pod for pod in view.pods.values() if pod.fell_back]


def ready(view: View) -> list[ObservedPod]:
    """Return the standby pods that can join a gang at once."""
    pods = [pod for pod in view.standbys.values() if in_place.survives(view, pod)]
    return [pod for pod in pods if (received := view.heartbeat_of(pod)) is not None and received.beat.waiting]


def delete_unwanted(view: View, status: FineTuneJobStatus) -> tuple[DeletePod, ...]:
    """Return deletions of standby pods that are not wanted any longer, or wait for the wrong kind of node.

    A standby pod that ended by itself stays until its attempt is over: a new one would end in the same way. One that
    the cluster ended or refused is replaced after a while.
    """
    if open_attempt(view, status) is None:
        return ()
    numbers = wanted(view, status)
    deletions = []
    for number, pod in view.standbys.items():
        outdated = number in numbers and pod.node is None and (numbers[number] is Capacity.ANY) != pod.fell_back
        replaceable = is_capacity_end(pod) and view.now >= _replace_at(pod)
        if pod.deleted_at is None and (outdated or replaceable or number not in numbers):
            deletions.append(DeletePod(pod.name, pod.uid, view.settings.peer_grace_seconds))
    return tuple(deletions)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the standby pods may accept any node, or one that the cluster ended is replaced."""
    if not wanted(view, status):
        return None
    ended = (pod for pod in view.standbys.values() if pod.deleted_at is None and is_capacity_end(pod))
    return earliest((_fallback_at(view, status), *map(_replace_at, ended)))


def _replace_at(pod: ObservedPod) -> datetime:
    return pod.created_at + REPLACE_AFTER


def _fallback_at(view: View, status: FineTuneJobStatus) -> datetime | None:
    entry, after = open_entry(status), spot.fallback_after(view.spec)
    if entry is None or entry.training_at is None or after is None:
        return None
    return entry.training_at + after


POLICY = Policy("standby", wake=wake, act=delete_unwanted)
