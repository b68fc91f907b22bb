"""A gang that is heard and does nothing: the attempt ends, and the rank that lags behind is named.

`note` remembers when anything was last seen to go on; `judge` compares with the longest time that this may take. Pods
that are silent are no hang: nobody knows what they do.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_contract import paths
from finetune_contract.heartbeat import RankReport, RankState
from finetune_operator.api.duration import parse_seconds
from finetune_operator.api.job import AttemptStatus, FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.causes import Cause
from finetune_operator.plan.model.ledger import open_entry, replace_current
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies.endings import settle
from finetune_operator.plan.policies.nodes import silence
from finetune_operator.plan.report import phase

STEPS = 20
"""By default a step may take so many times as long as the job's own steps took so far."""
MIN_SECONDS = 300.0
"""And never less than this: a save or a look at validation pictures comes between two steps."""
AT_STEPS = frozenset({RankState.TRAINING})
OVER = frozenset({RankState.DONE, RankState.SAVED, RankState.FAILED})


def judge(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt in which nothing has gone on for too long."""
    entry = open_entry(status)
    if entry is None or entry.attempt != view.attempt or is_finished(status):
        return status
    over_at = _over_at(view, status, entry)
    if over_at is None or view.now < over_at or _is_news(view, status, entry):
        return status
    lagging = min(view.reports, key=lambda report: (report.step or 0, report.rank))
    status = replace_current(status, revise(entry, ended_at=view.now))
    return settle(status, _cause(view, entry, lagging))


def note(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Remember that something goes on: a step, another state, another word of what it is busy with."""
    entry, old = open_entry(status), view.job.status
    if entry is None:
        return status
    before = old.attempts[-1] if old.attempts else None
    same = (old.reason, old.message, before and (before.attempt, before.to_step))
    if same == (status.reason, status.message, (entry.attempt, entry.to_step)) and entry.progress_at is not None:
        return status
    return replace_current(status, revise(entry, progress_at=view.now))


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When standing still becomes a hang."""
    entry = open_entry(status)
    if entry is None or entry.attempt != view.attempt or is_finished(status):
        return None
    return _over_at(view, status, entry)


def _over_at(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> datetime | None:
    """When it is a hang; None where that cannot be said."""
    # While the pods are not seen to run, the status speaks of that: beats may come before their pods do.
    if entry.progress_at is None or not view.all_up() or not _all_heard(view):
        return None
    if any(report.state in OVER for report in view.reports):
        return None
    return entry.progress_at + timedelta(seconds=_timeout_seconds(view, status))


def _is_news(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> bool:
    """Whether this very pass has read of a newer step, or of other work than the last one.

    The time of what the gang does begins once it is noted, however late its beats or its pods come to be seen.
    """
    old, told = view.job.status, phase.describe(view, status)
    return (told.reason, told.message, entry.to_step) != (old.reason, old.message, old.attempts[-1].to_step)


def _timeout_seconds(view: View, status: FineTuneJobStatus) -> float:
    if any(report.state not in AT_STEPS for report in view.reports):
        return view.settings.standstill_seconds
    asked, tally = view.spec.recovery.hang_timeout, status.tally
    if asked is not None:
        return float(parse_seconds(asked))
    if tally.trained_steps == 0:
        return view.settings.standstill_seconds
    return max(MIN_SECONDS, STEPS * tally.trained_seconds / tally.trained_steps)


def _all_heard(view: View) -> bool:
    """Whether every supervisor has spoken lately. Its beats come on while its ranks stand still."""
    limit = silence(view.observed, view.settings)
    heard = [received for received in view.beats.values() if view.now < received.received_at + limit]
    return len(heard) == view.num_nodes


def _cause(view: View, entry: AttemptStatus, lagging: RankReport) -> Cause:
    node_rank = lagging.rank // view.spec.topology.processes_per_node
    pod = view.pods.get(node_rank)
    since = entry.progress_at or view.now
    meta = view.job.metadata
    folder = f"{paths.job_folder(meta.namespace, meta.name, meta.uid)}/{paths.hang_folder(entry.attempt)}"
    words = (
        f"{lagging.state.value.lower()} at step {lagging.step or 0} since {since:%H:%M:%S} UTC; what every rank was "
        f"doing is in {folder} on the job's storage"
    )
    return Cause(
        Reason.HANG,
        rank=lagging.rank,
        pod=pod.name if pod is not None else "",
        node=pod.node if pod is not None else None,
        last_words=words,
    )
