"""How long a pod may be silent: only the time in which this operator listened counts.

An operator without CPU time, or one whose API server does not answer, receives no heartbeats. If that time counted,
many healthy pods would be replaced exactly when the operator has no time for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from finetune_operator.plan.model.types import Observed, ObservedPod, PodPhase, ReceivedHeartbeat
from finetune_operator.settings import Settings

SILENT_BEATS = 3
"""Heartbeats that a pod on a lost node may miss before it counts as lost, too."""


def silence(observed: Observed, settings: Settings) -> timedelta:
    """Return the time without a heartbeat after which a pod counts as silent."""
    return timedelta(seconds=SILENT_BEATS * max(settings.beat_seconds, observed.beat_seconds))


def silent_at(received: ReceivedHeartbeat, observed: Observed, settings: Settings) -> datetime:
    """Return when a pod counts as silent, by its newest heartbeat."""
    return extend(received.received_at, silence(observed, settings), observed)


def first_heard_by(observed: Observed, settings: Settings) -> datetime | None:
    """Return until when every living pod has sent a heartbeat to an operator that has just started; None: unknown."""
    since = observed.listening_since
    return extend(since, silence(observed, settings), observed) if since is not None else None


def is_unheard(pods: Iterable[ObservedPod], observed: Observed) -> bool:
    """Return whether a running pod has sent no heartbeat to this operator."""
    return any(pod.phase is PodPhase.RUNNING and pod.uid not in observed.beats for pod in pods)


def extend(since: datetime, limit: timedelta, observed: Observed, at_most: timedelta = timedelta.max) -> datetime:
    """Return when a time limit ends that counts only the time in which this operator listened.

    Args:
        since: start of the limit.
        limit: its length.
        observed: the observed state.
        at_most: longest extension.
    """
    return since + limit + min(unheard(since, observed), at_most)


def unheard(since: datetime, observed: Observed) -> timedelta:
    """Return the time since then in which this operator did not listen."""
    parts = (period.until - max(since, period.since) for period in observed.deaf if period.until > since)
    return sum(parts, start=timedelta(0))
