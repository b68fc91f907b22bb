"""A hang: all supervisors send heartbeats, but the ranks make no progress. The attempt ends and names the slowest rank.

`record_progress` writes the time of the last progress; `detect_hang` compares it with the longest allowed time. Silent
pods are not a hang: their state is unknown.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_contract import paths
from finetune_contract.heartbeat import RankReport, RankState
from finetune_operator.api.duration import parse_seconds
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model.activity import describe_activity
from finetune_operator.plan.model.causes import Cause
from finetune_operator.plan.model.closing import record_cause
from finetune_operator.plan.model.ledger import open_attempt, open_entry, replace_current
from finetune_operator.plan.model.listening import silent_at
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View

STEPS = 20
"""Default limit for one step, as a multiple of the job's mean step time so far."""
MIN_SECONDS = 300.0
"""Lower bound of that default: a save or a validation may run between two steps."""
AT_STEPS = frozenset({RankState.TRAINING})
OVER = frozenset({RankState.DONE, RankState.SAVED, RankState.FAILED})


def detect_hang(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt that has made no progress for too long."""
    entry = open_attempt(view, status)
    hung_at = _hung_at(view, status, entry) if entry is not None else None
    if entry is None or hung_at is None or view.now < hung_at or _has_progressed(view, status, entry):
        return status
    slowest = min(view.reports, key=lambda report: (report.step or 0, report.rank))
    return record_cause(view, status, _cause(view, entry, slowest))


def record_progress(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the time of progress: a new step, another reason, or another message of what the gang does."""
    entry, old = open_entry(status), view.job.status
    if entry is None:
        return status
    before = old.attempts[-1] if old.attempts else None
    same = (old.reason, old.message, before and (before.attempt, before.to_step))
    if same == (status.reason, status.message, (entry.attempt, entry.to_step)) and entry.progress_at is not None:
        return status
    return replace_current(status, revise(entry, progress_at=view.now))


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the lack of progress becomes a hang."""
    entry = open_attempt(view, status)
    return _hung_at(view, status, entry) if entry is not None else None


def _hung_at(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> datetime | None:
    """Return when the attempt counts as hung unless it makes progress; None if that cannot be determined."""
    # Heartbeats may arrive before the list shows their pods as running. Until then the status describes the pods.
    if entry.progress_at is None or not view.reports or not view.all_up() or not _all_send_heartbeats(view):
        return None
    if any(report.state in OVER for report in view.reports):
        return None
    return entry.progress_at + timedelta(seconds=_timeout_seconds(view, status))


def _has_progressed(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> bool:
    """Return whether this reconcile itself observes progress: a newer step, or another activity than the last one.

    The clock of an activity starts when it is first recorded, however late its heartbeats or pods become visible.
    """
    old, now = view.job.status, describe_activity(view, status)
    return (*now, entry.to_step) != (old.reason, old.message, old.attempts[-1].to_step)


def _timeout_seconds(view: View, status: FineTuneJobStatus) -> float:
    if any(report.state not in AT_STEPS for report in view.reports):
        return view.settings.standstill_seconds
    timeout, tally = view.spec.recovery.hang_timeout, status.tally
    if timeout is not None:
        return float(parse_seconds(timeout))
    if tally.trained_steps == 0:
        return view.settings.standstill_seconds
    return max(MIN_SECONDS, STEPS * tally.trained_seconds / tally.trained_steps)


def _all_send_heartbeats(view: View) -> bool:
    """Return whether every supervisor has sent a heartbeat lately. They continue to do so while their ranks hang."""
    recent = [beat for beat in view.beats.values() if view.now < silent_at(beat, view.observed, view.settings)]
    return len(recent) == view.num_nodes


def _cause(view: View, entry: AttemptStatus, slowest: RankReport) -> Cause:
    node_rank = slowest.rank // view.spec.topology.processes_per_node
    pod = view.pods.get(node_rank)
    since = entry.progress_at or view.now
    meta = view.job.metadata
    folder = f"{paths.job_folder(meta.namespace, meta.name, meta.uid)}/{paths.hang_folder(entry.attempt)}"
    activity = f"{slowest.state.value.lower()} at step {slowest.step or 0} since {since:%H:%M:%S} UTC"
    message = f"{activity}; the stacks of all ranks are in {folder} on the job's storage"
    return Cause(
        Reason.HANG,
        rank=slowest.rank,
        pod=pod.name if pod is not None else "",
        node=pod.node if pod is not None else None,
        message=message,
    )


DETECT = Policy("hangs", decide=detect_hang, wake=wake)
TRACK = Policy("hang-progress", decide=record_progress)
