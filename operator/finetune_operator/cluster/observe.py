"""From a pod as the API shows it to the little that the plan reads of it. Pure; the same for every cluster."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from finetune_contract.environment import PROCESSES_PER_NODE
from finetune_contract.heartbeat import MAX_LAST_WORDS, RankEnd, Termination
from finetune_operator.api import conditions, labels, names
from finetune_operator.api.job import Capacity
from finetune_operator.plan.model.types import ObservedPod, PodPhase

Json = Mapping[str, Any]
PREEMPTION = re.compile(r"( no new claims to deallocate,)? preemption: .*", re.DOTALL)
"""What the scheduler adds to each refusal: that nobody else can be put out either. It hides what is missing."""


def observe_pod(pod: Json) -> ObservedPod | None:
    """Read a pod; None where it does not carry our labels."""
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
    """The supervisor's last words; where it left none, the end of the log that stands in for them."""
    message = terminated.get("message")
    if not message:
        return None
    try:
        return Termination.model_validate_json(message)
    except ValueError:
        code = int(terminated["exitCode"])
        end = RankEnd(rank=node_rank * _ranks_per_pod(pod), exit_code=code, last_words=message[-MAX_LAST_WORDS:])
        return Termination(attempt=attempt, exit_code=code, ends=(end,))


def _ranks_per_pod(pod: Json) -> int:
    container = _find(pod["spec"]["containers"], "name", names.CONTAINER)
    value = _find(container.get("env") or (), "name", PROCESSES_PER_NODE).get("value") or "1"
    return int(value) if str(value).isdecimal() else 1


def _disruption(status: Json) -> str | None:
    condition = _find(status.get("conditions") or (), "type", conditions.DISRUPTION_TARGET)
    return condition.get("reason") or conditions.DISRUPTION_TARGET if condition.get("status") == "True" else None


def _waiting(status: Json, state: Json) -> str | None:
    """Why it does not run yet: the container's words, else the scheduler's."""
    if waiting := state.get("waiting"):
        return _sentence(waiting)
    scheduled = _find(status.get("conditions") or (), "type", "PodScheduled")
    return PREEMPTION.sub("", _sentence(scheduled)) if scheduled.get("status") == "False" else None


def _sentence(source: Json) -> str:
    return ": ".join(text for text in (source.get("reason"), source.get("message")) if text)


def _find(items: Iterable[Json], key: str, value: str) -> Json:
    """The item with this value; an empty one where there is none."""
    return next((item for item in items if item.get(key) == value), {})


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
