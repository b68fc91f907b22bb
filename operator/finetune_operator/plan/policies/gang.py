"""The pods of an attempt: all of them or none. Which are missing, and when the gang was complete."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.evictions import POD_FIELD
from finetune_operator.api.gangs import POD_GROUP
from finetune_operator.api.job import SchedulingMode
from finetune_operator.api.names import config_name, service_name
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.manifests import PodOptions, build_config, build_pod, build_service
from finetune_operator.manifests.gang import GangMembership, GroupOptions, build_group
from finetune_operator.manifests.placement import pack_label
from finetune_operator.plan.model import admission, gangs
from finetune_operator.plan.model.conditions import find
from finetune_operator.plan.model.ledger import follows_gpu_fault, open_attempt, open_entry, replace_current
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.silence import has_unheard_pod
from finetune_operator.plan.model.types import Create
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies.capacity import standby

OF_THE_NODE = frozenset({Reason.HANG, Reason.REFUSED_BY_KUBELET, Reason.GPU_FAULT})
"""Ends that are likely to happen again on the same node."""
MAX_NODES_RECORDED = 64
"""Largest gang of which the ledger records each pod's node: the ledger must stay small."""


def record_complete(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Record that all pods of the attempt were observed, and on which nodes. From then on a missing pod is lost.

    Before that, a missing pod may not have been created yet, or may not be visible yet.
    """
    entry = open_attempt(view, status)
    if entry is None or len(view.pods) < view.num_nodes:
        return status
    entry = revise(entry, gang_complete=True)
    nodes = tuple(pod.node for pod in view.pods.values() if pod.node is not None)
    if len(nodes) == view.num_nodes <= MAX_NODES_RECORDED:
        entry = revise(entry, pod_nodes=nodes)
    return replace_current(status, entry)


def create_missing(view: View, status: FineTuneJobStatus) -> tuple[Create, ...]:
    """Return the missing objects of the open attempt. Names are deterministic, so creating one twice does no harm.

    Nothing is created while a pod of another attempt exists: two gangs never share the storage or the capacity.
    """
    may_create = _may_create(view, status) and admission.may_create(view)
    return find_missing(view, status) if may_create and not _is_held(view) else ()


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when to create again what the cluster refused."""
    return view.observed.create_after if _is_held(view) and find_missing(view, status) else None


def _is_held(view: View) -> bool:
    """Return whether a creation failed lately, and its back-off is not over yet."""
    return view.observed.create_after is not None and view.now < view.observed.create_after


def _may_create(view: View, status: FineTuneJobStatus) -> bool:
    """Return whether the spec is accepted. A spec that only the cluster refused is tried again at intervals."""
    accepted = find(status, ConditionType.ACCEPTED)
    if accepted is None or accepted.status != "True":
        return accepted is not None and accepted.reason == Reason.FAILED_CREATE and not view.creation_on_hold
    return True


def find_missing(view: View, status: FineTuneJobStatus) -> tuple[Create, ...]:
    """Return the missing objects of the open attempt, whether they may be created now or not."""
    entry = open_entry(status)
    num_own = len(view.pods) + len(view.standbys)
    fenced = status.attempt == view.attempt and num_own == len(view.observed.pods)
    if entry is None or not fenced or is_finished(status):
        return ()
    name = view.job.metadata.name
    missing = []
    if config_name(name) not in view.observed.configs:
        missing.append(Create(build_config(view.job)))
    has_service = service_name(name) in view.observed.services
    if not has_service and _needs_service(view, status):
        missing.append(Create(build_service(view.job, view.settings)))
    workload = admission.active(view) if admission.uses_queue(view) else None
    membership = gangs.membership(view, entry)
    grouped = membership is not None and membership.mode is SchedulingMode.POD_GROUP
    options = PodOptions(
        num_nodes=view.num_nodes,
        first_pod=view.members[0],
        avoid=_bad_nodes(status),
        capacity=entry.capacity,
        mtbf_seconds=entry.mtbf_seconds,
        checks_devices=follows_gpu_fault(status),
        admission=workload.update if workload is not None else None,
        gang=membership,
        has_names=(has_service or not view.settings.coordinator_url) and _has_name(view),
        names_responder=POD_FIELD in view.observed.optional_apis and not grouped,
    )
    if not entry.gang_complete:
        ranks = (rank for rank in range(view.num_nodes) if rank not in view.pods and not view.is_kept(rank))
        pods = [Create(build_pod(view.job, view.attempt, rank, view.settings, options)) for rank in ranks]
        missing += [*_missing_group(view, membership), *pods] if pods else []
    for number, capacity in standby.wanted(view, status).items():
        if number not in view.standbys:
            standby_options = replace(options, capacity=capacity, is_standby=True, gang=None)
            missing.append(Create(build_pod(view.job, view.attempt, number, view.settings, standby_options)))
    return tuple(missing)


def _needs_service(view: View, status: FineTuneJobStatus) -> bool:
    """Return whether a pod of the gang cannot ask where rank 0 is: there is no coordinator, or it cannot reach it."""
    if view.num_nodes == 1:
        return False
    return not view.settings.coordinator_url or has_unheard_pod(view, status)


def _has_name(view: View) -> bool:
    """Return whether the job's service gives the pod of rank 0 a name: it may select only pods created as rank 0."""
    return view.num_nodes > 1 and (view.members[0].number == 0 or view.spec.topology.max_nodes is not None)


def _missing_group(view: View, membership: GangMembership | None) -> tuple[Create, ...]:
    """Return the PodGroup of the attempt, before its pods: a scheduler may wait for it."""
    api = view.observed.gang_apis.get(membership.mode) if membership is not None else None
    if membership is None or api is None or not membership.group:
        return ()
    if any(child.kind == POD_GROUP and child.name == membership.group for child in view.observed.children):
        return ()
    options = GroupOptions(membership.mode, api, gangs.least_new(view), pack_label(view.spec, view.settings))
    return (Create(build_group(view.job, view.attempt, options)),)


def _bad_nodes(status: FineTuneJobStatus) -> tuple[str, ...]:
    """Return the nodes on which a rank of this job has hung or lost its GPU, or which have refused one of its pods.

    And those on which a packed gang began that found no room in its rack or zone.
    """
    reasons = OF_THE_NODE | {Reason.GANG_RELEASED}
    return tuple(sorted({old.node for old in status.attempts if old.reason in reasons and old.node}))


POLICY = Policy("gang", decide=record_complete, wake=wake, act=create_missing)
