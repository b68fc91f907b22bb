"""Conversion of a pod from its API form to the fields that the plan reads. Pure; used by all clusters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from finetune_contract.environment import PROCESSES_PER_NODE
from finetune_contract.heartbeat import MAX_LAST_OUTPUT, RankEnd, Termination
from finetune_operator.api import conditions, labels, names
from finetune_operator.api.status import Capacity
from finetune_operator.plan.model.types import ObservedPod, PodPhase

Json = Mapping[str, Any]
PREEMPTION = re.compile(r"( no new claims to deallocate,)? preemption: .*", re.DOTALL)
"""Suffix that the scheduler adds to each reason: that preemption would not help either. It hides the real reason."""


def observe_pod(pod: Json) -> ObservedPod | None:
    """Read a pod; return None if it does not have the operator's labels."""
    meta, status = pod["metadata"], pod.get("status") or {}
    own = meta.get("labels") or {}
    try:
        attempt, node_rank = int(own[labels.ATTEMPT]), int(own[labels.NODE_RANK])
    except (KeyError, ValueError):
        return None
    container = _find(status.get("containerStatuses") or (), "name", names.CONTAINER)
    state = container.get("state") or {}
    terminated = state.get("terminated") or {}
    grace = timedelta(seconds=meta.get("deletionGracePeriodSeconds") or 0)
    deletion = _time(meta.get("deletionTimestamp"))
    created = _time(meta.get("creationTimestamp"))
    assert created is not None
    return ObservedPod(
        name=meta["name"],
        uid=meta["uid"],
        attempt=attempt,
        node_rank=node_rank,
        phase=PodPhase(status.get("phase") or PodPhase.PENDING),
        created_at=created,
        node=pod["spec"].get("nodeName"),
        deleted_at=deletion - grace if deletion else None,
        grace=grace,
        ready=bool(container.get("ready")),
        exit_code=terminated.get("exitCode"),
        finished_at=_time(terminated.get("finishedAt")),
        termination=_termination(terminated, attempt, pod, node_rank),
        disruption=_disruption(status),
        reason=status.get("reason") or terminated.get("reason"),
        fell_back=own.get(labels.CAPACITY) == Capacity.ANY,
        waiting=_waiting(status, state),
    )


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


def _ranks_per_pod(pod: Json) -> int:
    container = _find(pod["spec"]["containers"], "name", names.CONTAINER)
    value = _find(container.get("env") or (), "name", PROCESSES_PER_NODE).get("value") or "1"
    return int(value) if str(value).isdecimal() else 1


def _disruption(status: Json) -> str | None:
    condition = _find(status.get("conditions") or (), "type", conditions.DISRUPTION_TARGET)
    return condition.get("reason") or conditions.DISRUPTION_TARGET if condition.get("status") == "True" else None


def _waiting(status: Json, state: Json) -> str | None:
    """Return why a pod does not run yet: the container's reason, or the scheduler's."""
    if waiting := state.get("waiting"):
        return _join_message(waiting)
    scheduled = _find(status.get("conditions") or (), "type", "PodScheduled")
    return PREEMPTION.sub("", _join_message(scheduled)) if scheduled.get("status") == "False" else None


def _join_message(source: Json) -> str:
    return ": ".join(text for text in (source.get("reason"), source.get("message")) if text)


def _find(items: Iterable[Json], key: str, value: str) -> Json:
    """Return the first item with this value; an empty one if there is none."""
    return next((item for item in items if item.get(key) == value), {})


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
