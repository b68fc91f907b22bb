"""How the pods of an attempt receive their nodes together, and how many of them hold one. Pure; read by many policies.

The mode is recorded when an attempt begins: its pods must all be created in the same way, also if the cluster begins
to serve another API while they are.
"""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api import gangs
from finetune_operator.api.job import SchedulingMode
from finetune_operator.api.status import AttemptStatus
from finetune_operator.manifests.gang import GangMembership, group_name
from finetune_operator.plan.model import admission
from finetune_operator.plan.model.types import ObservedPod
from finetune_operator.plan.model.view import View, has_ended


def choose(view: View) -> SchedulingMode:
    """Return how the next attempt is scheduled.

    A queue admits all pods of a gang at once, so `auto` adds nothing to it.
    """
    mode = view.spec.scheduling
    if not view.settings.gangs or (mode is SchedulingMode.AUTO and admission.uses_queue(view)):
        return SchedulingMode.NONE
    if mode is not SchedulingMode.AUTO:
        return mode
    served = SchedulingMode.POD_GROUP in view.observed.gang_apis
    return SchedulingMode.POD_GROUP if served else SchedulingMode.GATES


def mode_of(entry: AttemptStatus) -> SchedulingMode:
    """Return how an attempt is scheduled; attempts of older operators have no mode."""
    return SchedulingMode(entry.scheduling) if entry.scheduling is not None else SchedulingMode.NONE


def membership(view: View, entry: AttemptStatus) -> GangMembership | None:
    """Return how the pods that the attempt creates belong together; None if each is scheduled by itself."""
    mode, num_new = mode_of(entry), sum(not view.is_kept(rank) for rank in range(view.num_nodes))
    if mode is SchedulingMode.NONE or num_new < 2:
        return None
    return GangMembership(mode, group_name(view.job.metadata.name, view.attempt) if has_group(mode) else "")


def has_group(mode: SchedulingMode) -> bool:
    """Return whether a mode needs a PodGroup."""
    return mode in gangs.SERVED_VERSIONS


def least(view: View) -> int:
    """Return the smallest number of pods with which the gang may train."""
    return min(view.num_nodes, view.spec.topology.min_nodes or view.num_nodes)


def least_new(view: View) -> int:
    """Return how many of the pods that the attempt creates must receive nodes together."""
    num_kept = sum(view.is_kept(rank) for rank in range(view.num_nodes))
    return max(1, least(view) - num_kept)


def placed(view: View) -> list[ObservedPod]:
    """Return the pods of the attempt that have a node and are not about to leave it."""
    pods = (pod for pod in view.pods.values() if pod.node is not None and not has_ended(pod))
    return [pod for pod in pods if pod.deleted_at is None and pod.disruption is None]


def held_since(view: View, entry: AttemptStatus) -> datetime | None:
    """Return since when pods of an incomplete gang hold nodes that the gang cannot use; None: none does.

    A pod that was kept has held its node for longer, but in vain only since the attempt began.
    """
    pods = placed(view)
    if entry.seconds.queueing is not None or len(pods) >= least(view):
        return None
    return min((max(entry.started_at, pod.scheduled_at or pod.created_at) for pod in pods), default=None)
