"""Pods that wait for the next world: they are how a job learns that capacity is there again.

A job that runs on fewer nodes than it asked for, or on others than spot, asks for the better ones all the time: with
pods that are just like its own, so that the scheduler and any autoscaler treat them alike. Once such a pod runs and is
heard, its image pulled, the gang is put together anew with it (see `regroup`).
"""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api.job import Capacity, FineTuneJobStatus
from finetune_operator.api.names import MAX_NODES
from finetune_operator.manifests import num_nodes
from finetune_operator.plan.model.ledger import open_entry
from finetune_operator.plan.model.types import DeletePod, ObservedPod
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies import capacity, elastic, in_place


def wanted(view: View, status: FineTuneJobStatus) -> dict[int, Capacity | None]:
    """Numbers of the pods that should stand by, and what each asks for. Only beside an attempt that trains."""
    entry = open_entry(status)
    if entry is None or entry.attempt != view.attempt or entry.training_at is None or is_finished(status):
        return {}
    if not in_place.is_possible(view) or view.spec.suspend:
        return {}
    num_missing = num_nodes(view.spec) - view.num_nodes if elastic.is_elastic(view.spec) else 0
    num_asked = num_missing + (len(fallen_back(view)) if view.spec.recovery.spot is not None else 0)
    due = _any_at(view, status)
    any_will_do = due is not None and view.now >= due
    numbers = range(view.num_nodes, min(view.num_nodes + num_asked, MAX_NODES))
    return {
        number: Capacity.ANY if any_will_do and number < view.num_nodes + num_missing else None for number in numbers
    }


def fallen_back(view: View) -> list[ObservedPod]:
    """Pods of the attempt that were allowed to take other nodes than spot."""
    return [pod for pod in view.pods.values() if pod.fell_back]


def ready(view: View) -> list[ObservedPod]:
    """Pods that stand by and could begin at once."""
    pods = [pod for pod in view.standbys.values() if in_place.survives(view, pod)]
    return [pod for pod in pods if (received := view.heard(pod)) is not None and received.beat.waiting]


def delete_unwanted(view: View, status: FineTuneJobStatus) -> tuple[DeletePod, ...]:
    """Pods that stand by for nothing, or wait for a kind of node that need not be any more.

    One that ended by itself stays until its attempt is over: it would end so again.
    """
    entry = open_entry(status)
    if entry is None or entry.attempt != view.attempt:
        return ()
    asked = wanted(view, status)
    doomed = []
    for number, pod in view.standbys.items():
        outdated = number in asked and pod.node is None and (asked[number] is Capacity.ANY) != pod.fell_back
        if pod.deleted_at is None and (outdated or (number not in asked and not is_finished(status))):
            doomed.append(DeletePod(pod.name, pod.uid, view.settings.peer_grace_seconds))
    return tuple(doomed)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When a pod that stands by may take any node."""
    return _any_at(view, status) if wanted(view, status) else None


def _any_at(view: View, status: FineTuneJobStatus) -> datetime | None:
    entry, after = open_entry(status), capacity.fallback_after(view.spec)
    if entry is None or entry.training_at is None or after is None:
        return None
    return entry.training_at + after
