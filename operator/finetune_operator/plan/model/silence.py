"""Silent pods: they run, and the coordinator receives no heartbeat from them, or has never received one."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import NamedTuple

from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.listening import extend
from finetune_operator.plan.model.types import ObservedPod, PodPhase
from finetune_operator.plan.model.view import View, earliest, has_ended


class LastSign(NamedTuple):
    """The last heartbeat of a running pod, or else the time since which it should send heartbeats."""

    pod: ObservedPod
    at: datetime


def describe_silence(view: View, status: FineTuneJobStatus) -> str | None:
    """Return which pod has sent no heartbeat for too long, since when, and what it waits for; None if there is none."""
    timeout = _timeout(view)
    for sign in _last_signs(view, status):
        if extend(sign.at, timeout, view.observed) <= view.now:
            waiting = f"; {sign.pod.waiting}" if sign.pod.waiting else ""
            return f"{sign.pod.name} has sent no heartbeat since {sign.at:%H:%M:%S} UTC{waiting}"
    return None


def has_unheard_pod(view: View, status: FineTuneJobStatus) -> bool:
    """Return whether a running pod is silent that has never sent a heartbeat to this operator.

    Pods without an address are those of one machine, which share the network of the operator.
    """
    timeout = _timeout(view)
    silent = (sign.pod for sign in _last_signs(view, status) if extend(sign.at, timeout, view.observed) <= view.now)
    return any(pod.address and view.heartbeat_of(pod) is None for pod in silent)


def silent_at(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the next running pod counts as silent; None if all pods that can become silent are."""
    timeout = _timeout(view)
    moments = (extend(sign.at, timeout, view.observed) for sign in _last_signs(view, status))
    return earliest(at for at in moments if at > view.now)


def _timeout(view: View) -> timedelta:
    return timedelta(seconds=view.settings.beat_timeout_seconds)


def _last_signs(view: View, status: FineTuneJobStatus) -> Iterator[LastSign]:
    """Yield the last sign of each pod of the attempt that should send heartbeats."""
    expected_since = _expected_since(view, status)
    for rank, pod in view.pods.items():
        if pod.phase is not PodPhase.RUNNING or has_ended(pod) or view.is_done(rank):
            continue
        # A kept pod may have sent its last heartbeat in an earlier attempt.
        received = view.beats.get(rank) or view.heartbeat_of(pod)
        if received is not None:
            yield LastSign(pod, received.received_at)
        elif expected_since is not None:
            yield LastSign(pod, expected_since)


def _expected_since(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return since when every pod should have sent a heartbeat: all run, and this operator listens.

    None while pods are starting, or if there is no coordinator. An operator that has just started has received no
    heartbeat yet.
    """
    entry = current(status)
    if entry is None or entry.seconds.pulling is None or not view.settings.coordinator_url:
        return None
    all_run_at = entry.started_at + timedelta(seconds=(entry.seconds.queueing or 0.0) + entry.seconds.pulling)
    return max(all_run_at, view.observed.listening_since or all_run_at)
