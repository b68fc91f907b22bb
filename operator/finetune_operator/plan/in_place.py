"""Recovery in place: which pods of an attempt that has ended are kept for the next one.

Their supervisors are told of the new world (see `replies`) and start their ranks anew there: image, caches and the
node itself are kept, and only the lost pod is scheduled. It is tried once: an attempt that was begun so and ended
before its first step is followed by a whole gang.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_contract.exit_codes import ExitCode
from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.words import Reason
from finetune_operator.plan.ledger import current
from finetune_operator.plan.nodes import SILENT_BEATS
from finetune_operator.plan.restart import WITH_OWN_GRACE, may_save, notice_over_at
from finetune_operator.plan.types import ObservedPod, PodPhase
from finetune_operator.plan.view import View, earliest, has_ended, is_finished

HOLDABLE = frozenset({ExitCode.FABRIC, ExitCode.SAVED})
"""Ends of ranks that say nothing against their pod."""


def survivors(view: View, status: FineTuneJobStatus) -> frozenset[int]:
    """Node ranks whose pods are kept: they run, and their supervisors are heard and want nothing but a peer."""
    if not _is_worth_it(view, status):
        return frozenset()
    entry = current(status)
    hung = entry.pod if entry is not None and entry.reason == Reason.HANG else None
    kept = frozenset(rank for rank, pod in view.pods.items() if pod.name != hung and _survives(view, rank, pod))
    # Where none is lost, the gang itself is at fault: a fabric that failed between well pods.
    return kept if len(kept) < view.num_nodes else frozenset()


def pod_attempts(view: View, kept: frozenset[int], attempt: int) -> tuple[int, ...]:
    """For each node rank the attempt of its pod in the next attempt; nothing where none is kept."""
    if not kept:
        return ()
    return tuple(view.pod_attempts[rank] if rank in kept else attempt for rank in range(view.num_nodes))


def is_saving(view: View, status: FineTuneJobStatus, kept: frozenset[int]) -> bool:
    """Whether survivors are still busy with the save that a notice to their peer gives them time for."""
    entry = current(status)
    if entry is None or not kept or not may_save(entry, view) or view.now >= notice_over_at(entry, view):
        return False
    return not all(view.beats[rank].beat.waiting for rank in kept)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When a survivor has been silent for so long that it is none any more, or the notice is over."""
    entry = current(status)
    kept = survivors(view, status)
    if entry is None or not kept:
        return None
    moments: list[datetime | None] = [_silent_at(view, rank) for rank in kept]
    if is_saving(view, status, kept):
        moments.append(notice_over_at(entry, view))
    return earliest(moments)


def _is_worth_it(view: View, status: FineTuneJobStatus) -> bool:
    entry = current(status)
    if entry is None or entry.reason is None or entry.attempt != view.attempt or is_finished(status):
        return False
    if not view.settings.coordinator_url or not view.settings.hold_seconds or view.spec.suspend:
        return False
    failed_in_place = bool(entry.pod_attempts) and entry.training_at is None
    return entry.counts_as is not None and entry.reason not in WITH_OWN_GRACE and not failed_in_place


def _survives(view: View, rank: int, pod: ObservedPod) -> bool:
    received = view.beats.get(rank)
    if received is None or received.beat.notice or view.now >= _silent_at(view, rank):
        return False
    if pod.phase is not PodPhase.RUNNING or has_ended(pod) or pod.deleted_at is not None:
        return False
    fine = all(end.exit_code in HOLDABLE for end in received.beat.ends)
    return fine and pod.disruption is None and pod.reason is None


def _silent_at(view: View, rank: int) -> datetime:
    return view.beats[rank].received_at + timedelta(seconds=SILENT_BEATS * view.settings.beat_seconds)
