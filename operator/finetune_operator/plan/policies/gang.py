"""The pods of the attempt: all of them or none. Which are missing, and when the gang has been complete."""

from __future__ import annotations

from dataclasses import replace

from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.names import config_name, service_name
from finetune_operator.api.reasons import Reason
from finetune_operator.manifests import Surroundings, build_config, build_pod, build_service
from finetune_operator.plan.model.ledger import open_entry, replace_current
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.types import Create
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies import standby
from finetune_operator.plan.report.conditions import find

MAX_NODES_NOTED = 64
"""Of larger gangs the ledger does not hold each pod's node: it must stay small."""


def see_complete(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Remember that all pods of the attempt were there, and on which nodes: from now on a missing one is lost.

    Before, a missing pod may just not have been created, or not be visible yet.
    """
    entry = open_entry(status)
    if entry is None or entry.attempt != view.attempt or len(view.pods) < view.num_nodes:
        return status
    entry = revise(entry, gang_complete=True)
    nodes = tuple(pod.node for pod in view.pods.values() if pod.node is not None)
    if len(nodes) == view.num_nodes <= MAX_NODES_NOTED:
        entry = revise(entry, pod_nodes=nodes)
    return replace_current(status, entry)


def create_missing(view: View, status: FineTuneJobStatus) -> tuple[Create, ...]:
    """What the open attempt lacks. Names are deterministic, so that asking twice for one that is slow to show is fine.

    Nothing is created while a pod of another attempt is left: two gangs never share the storage or the capacity.
    """
    return missing(view, status) if _may_create(view, status) else ()


def _may_create(view: View, status: FineTuneJobStatus) -> bool:
    """Whether the spec is accepted. What the cluster alone refused is tried once in a while."""
    accepted = find(status, ConditionType.ACCEPTED)
    if accepted is None or accepted.status != "True":
        return accepted is not None and accepted.reason == Reason.FAILED_CREATE and not view.holds_back
    return True


def missing(view: View, status: FineTuneJobStatus) -> tuple[Create, ...]:
    """What the open attempt lacks, whether it may be created or not."""
    entry = open_entry(status)
    num_mine = len(view.pods) + len(view.standbys)
    fenced = status.attempt == view.attempt and num_mine == len(view.observed.pods)
    if entry is None or not fenced or is_finished(status):
        return ()
    name = view.job.metadata.name
    lacking = []
    if config_name(name) not in view.observed.configs:
        lacking.append(Create(build_config(view.job)))
    if service_name(name) not in view.observed.services:
        lacking.append(Create(build_service(view.job, view.settings)))
    around = Surroundings(
        num_nodes=view.num_nodes,
        first_pod=view.members[0],
        avoid=_hung_nodes(status),
        capacity=entry.capacity,
        mtbf_seconds=entry.mtbf_seconds,
    )
    if not entry.gang_complete:
        ranks = (rank for rank in range(view.num_nodes) if rank not in view.pods and not view.is_kept(rank))
        lacking += [Create(build_pod(view.job, view.attempt, rank, view.settings, around)) for rank in ranks]
    for number, kind in standby.wanted(view, status).items():
        if number not in view.standbys:
            beside = replace(around, capacity=kind, stands_by=True)
            lacking.append(Create(build_pod(view.job, view.attempt, number, view.settings, beside)))
    return tuple(lacking)


def _hung_nodes(status: FineTuneJobStatus) -> tuple[str, ...]:
    """Nodes on which a rank of this job stood still."""
    return tuple(sorted({old.node for old in status.attempts if old.reason == Reason.HANG and old.node}))
