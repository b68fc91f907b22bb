"""Conversion of a pod from its API form to the fields that the plan reads. Pure; used by all clusters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from finetune_contract.environment import PROCESSES_PER_NODE
from finetune_contract.heartbeat import MAX_LAST_OUTPUT, RankEnd, Termination
from finetune_contract.outputs.request import ExportResult
from finetune_operator.api import conditions, labels, names
from finetune_operator.api.gangs import GATE
from finetune_operator.api.status import Capacity
from finetune_operator.cluster.observe_containers import (
    describe_init_failure,
    describe_sidecar_failure,
    describe_wait,
    find,
)
from finetune_operator.plan.model.types import ObservedExport, ObservedPod, PodPhase

Json = Mapping[str, Any]
SIGKILL_EXIT = 137
PREEMPTION = re.compile(r"( no new claims to deallocate,)? preemption: .*", re.DOTALL)
"""Suffix that the scheduler adds to each reason: that preemption would not help either. It hides the real reason."""


def observe_pod(pod: Json) -> ObservedPod | None:
    """Read a pod; return None if it does not have the operator's labels."""
    meta, status = pod["metadata"], pod.get("status") or {}
    own = meta.get("labels") or {}
    try:
        attempt, node_rank = (0, 0) if labels.EXPORT in own else (int(own[labels.ATTEMPT]), int(own[labels.NODE_RANK]))
    except (KeyError, ValueError):
        return None
    container = find(status.get("containerStatuses") or (), names.CONTAINER)
    state = container.get("state") or {}
    terminated = state.get("terminated") or {}
    export = _export(own, terminated)
    termination = _termination(terminated, attempt, pod, node_rank) if export is None else None
    ended_at = _time(terminated.get("finishedAt"))
    grace = timedelta(seconds=meta.get("deletionGracePeriodSeconds") or 0)
    deletion = _time(meta.get("deletionTimestamp"))
    created = _time(meta.get("creationTimestamp"))
    assert created is not None
    return ObservedPod(
        name=meta["name"],
        uid=meta["uid"],
        attempt=attempt,
        node_rank=node_rank,
        phase=_phase(status, state),
        created_at=created,
        node=pod["spec"].get("nodeName"),
        scheduled_at=_scheduled_at(status),
        address=status.get("podIP") or "",
        gated=any(gate["name"] == GATE for gate in pod["spec"].get("schedulingGates") or ()),
        deleted_at=deletion - grace if deletion else None,
        grace=grace,
        ready=bool(container.get("ready")),
        exit_code=terminated.get("exitCode"),
        finished_at=ended_at,
        termination=termination,
        disruption=_disruption(status).get("reason"),
        reason=status.get("reason") or terminated.get("reason"),
        message=status.get("message") or _disruption(status).get("message"),
        killed=_was_killed(terminated, pod),
        init_failure=describe_init_failure(status),
        sidecar_failure=describe_sidecar_failure(status, ended_at),
        fell_back=own.get(labels.CAPACITY) == Capacity.ANY,
        waiting=describe_wait(pod) or _describe_scheduling(status),
        memory=str(memory) if (memory := _limits(pod).get("memory")) is not None else None,
        template=own.get(labels.TEMPLATE),
        export=export,
    )


def _export(own: Json, terminated: Json) -> ObservedExport | None:
    """Return what only an export pod has; if it could not write its result, the end of its log is the message."""
    if labels.EXPORT not in own:
        return None
    message = terminated.get("message")
    if not message:
        return ObservedExport(own[labels.EXPORT])
    try:
        return ObservedExport(own[labels.EXPORT], ExportResult.model_validate_json(message))
    except ValueError:
        return ObservedExport(own[labels.EXPORT], ExportResult(message=message[-MAX_LAST_OUTPUT:].strip()))


def _phase(status: Json, state: Json) -> PodPhase:
    """Return the phase of a pod as its trainer's container decides it.

    Kubernetes' phase is Pending while a sidecar waits for its image, and Failed if a sidecar fails.
    """
    phase = PodPhase(status.get("phase") or PodPhase.PENDING)
    if phase is PodPhase.PENDING and "running" in state:
        return PodPhase.RUNNING
    is_done = (state.get("terminated") or {}).get("exitCode") == 0
    return PodPhase.SUCCEEDED if phase is PodPhase.FAILED and is_done else phase


def _termination(terminated: Json, attempt: int, pod: Json, node_rank: int) -> Termination | None:
    """Return the supervisor's termination message; if it is missing, one built from the end of the log."""
    message = terminated.get("message")
    if not message:
        return None
    try:
        return Termination.model_validate_json(message)
    except ValueError:
        code = int(terminated["exitCode"])
        end = RankEnd(rank=node_rank * _ranks_per_pod(pod), exit_code=code, last_words=message[-MAX_LAST_OUTPUT:])
        return Termination(attempt=attempt, exit_code=code, ends=(end,))


def _was_killed(terminated: Json, pod: Json) -> bool:
    """Return whether SIGKILL ended a container with a memory limit before its supervisor reported the end of a rank.

    The kernel does that when the container exceeds its limit. The container runtime does not always record it.
    """
    if terminated.get("exitCode") != SIGKILL_EXIT or "memory" not in _limits(pod):
        return False
    try:
        return not Termination.model_validate_json(terminated.get("message") or "").ends
    except ValueError:
        return True


def _limits(pod: Json) -> Json:
    container = find(pod["spec"].get("containers") or (), names.CONTAINER)
    return (container.get("resources") or {}).get("limits") or {}


def _ranks_per_pod(pod: Json) -> int:
    container = find(pod["spec"]["containers"], names.CONTAINER)
    value = find(container.get("env") or (), PROCESSES_PER_NODE).get("value") or "1"
    return int(value) if str(value).isdecimal() else 1


def _disruption(status: Json) -> Json:
    """Return reason and message of the disruption that ends a pod; an empty object if there is none."""
    condition = _condition(status, conditions.DISRUPTION_TARGET)
    if condition.get("status") != "True":
        return {}
    return {"reason": conditions.DISRUPTION_TARGET, **{key: text for key, text in condition.items() if text}}


def _scheduled_at(status: Json) -> datetime | None:
    """Return when a pod received its node, if the scheduler has reported it."""
    scheduled = _condition(status, "PodScheduled")
    return _time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else None


def _describe_scheduling(status: Json) -> str | None:
    """Return why a pod has no node yet; None if it has one."""
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") != "False":
        return None
    return PREEMPTION.sub("", ": ".join(text for text in (scheduled.get("reason"), scheduled.get("message")) if text))


def _condition(status: Json, kind: str) -> Json:
    return next((condition for condition in status.get("conditions") or () if condition.get("type") == kind), {})


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
