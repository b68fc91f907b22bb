"""The duration of each stage of a restart, in seconds, for the newest attempt; each is written when its stage ends."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from finetune_contract.heartbeat import RankState
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptSeconds, AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model.ledger import current, replace_current
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import UP, View, earliest

AT_WORK = frozenset({RankState.TRAINING, RankState.SAVING, RankState.VALIDATING, RankState.EXPORTING, RankState.DONE})


def measure(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the duration of every stage that has ended since the last reconcile."""
    entry = current(status)
    if entry is None:
        return status
    seconds = _teardown(status, entry)
    if entry.attempt == view.attempt:
        if entry.ended_at is None:
            seconds = _stages(view, entry, seconds)
        elif entry.reason is not None:
            seconds = _detection(view, entry, seconds)
    return replace_current(status, revise(entry, seconds=seconds))


def _teardown(status: FineTuneJobStatus, entry: AttemptStatus) -> AttemptSeconds:
    ended_at = status.attempts[-2].ended_at if len(status.attempts) > 1 else None
    if ended_at is None or entry.seconds.teardown is not None:
        return entry.seconds
    return revise(entry.seconds, teardown=_seconds_between(ended_at, entry.started_at))


def _stages(view: View, entry: AttemptStatus, seconds: AttemptSeconds) -> AttemptSeconds:
    """Add the durations of the stages of the start. Each stage begins when the one before it ends."""
    began = entry.started_at
    for name, is_over in STAGES:
        known = getattr(seconds, name)
        if known is None:
            if not is_over(view, entry):
                break
            known = _seconds_between(began, _placed_at(view) if name == QUEUEING else view.now)
            seconds = revise(seconds, **{name: known})
        began += timedelta(seconds=known)
    return seconds


def _detection(view: View, entry: AttemptStatus, seconds: AttemptSeconds) -> AttemptSeconds:
    if entry.ended_at is None or seconds.detection is not None:
        return seconds
    began = _fault_began_at(view, entry)
    return seconds if began is None else revise(seconds, detection=_seconds_between(began, entry.ended_at))


def _fault_began_at(view: View, entry: AttemptStatus) -> datetime | None:
    """Return when the fault that ended an attempt began.

    For a hang, the time of the last progress; otherwise the end or the notice of the pod that caused it, or else its
    last heartbeat.
    """
    if entry.reason == Reason.HANG:
        return entry.progress_at
    pod = next((pod for pod in view.pods.values() if pod.name == entry.pod), None)
    if pod is not None and (known := earliest((pod.finished_at, pod.deleted_at))) is not None:
        return known
    arrivals = [received.received_at for received in view.beats.values() if received.beat.pod == entry.pod]
    return arrivals[0] if arrivals else None


def _all_placed(view: View, _: AttemptStatus) -> bool:
    return len(view.pods) == view.num_nodes and all(pod.node for pod in view.pods.values())


def _placed_at(view: View) -> datetime:
    """Return when the last pod received its node: a gang that starts is not reconciled at that moment."""
    return min(view.now, max(pod.scheduled_at or view.now for pod in view.pods.values()))


def _all_run(view: View, _: AttemptStatus) -> bool:
    return all(pod.phase in UP for pod in view.pods.values())


def _all_restored(view: View, _: AttemptStatus) -> bool:
    return len(view.beats) == view.num_nodes and all(report.state in AT_WORK for report in view.reports)


def _has_trained(_: View, entry: AttemptStatus) -> bool:
    return entry.training_at is not None


QUEUEING = "queueing"
STAGES: tuple[tuple[str, Callable[[View, AttemptStatus], bool]], ...] = (
    (QUEUEING, _all_placed),
    ("pulling", _all_run),
    ("restoring", _all_restored),
    ("first_step", _has_trained),
)
"""The stages of a start in order, each with the test that it has ended."""


def _seconds_between(begin: datetime, end: datetime) -> float:
    """Return the seconds between two times, at least 0: they may come from different machines' clocks."""
    return round(max(0.0, (end - begin).total_seconds()), 1)


POLICY = Policy("timing", decide=measure)
