"""Recovery in place: which pods of an attempt that has ended are kept for the next one, and where they belong there.

Their supervisors are told of the new world (see `replies`) and start their ranks anew there: image, caches and the
node itself are kept, and only what is missing is scheduled. Pods that stand by (see `standby`) are kept in the same
way. It is tried once: an attempt that was begun so, had all its pods and ended before its first step is followed by a
whole gang.
"""

from __future__ import annotations

from datetime import datetime

from finetune_contract.exit_codes import HOLDABLE
from finetune_operator.api.job import AttemptStatus, FineTuneJobStatus
from finetune_operator.api.reasons import REGROUPS, CountsAs, Reason
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.types import IMAGE_ERRORS, ObservedPod, PodPhase
from finetune_operator.plan.model.view import Member, View, earliest, has_ended, is_finished
from finetune_operator.plan.policies import elastic
from finetune_operator.plan.policies.cleanup import WITH_OWN_GRACE, may_save, notice_over_at
from finetune_operator.plan.policies.endings import believe_at
from finetune_operator.plan.policies.nodes import silence

"""Ends of ranks that say nothing against their pod."""


def survivors(view: View, status: FineTuneJobStatus) -> tuple[ObservedPod, ...]:
    """The pods that are kept: they run, and their supervisors are heard and want nothing but a peer.

    No more than the next attempt has room for; those that fell back to other nodes than spot go first.
    """
    entry = current(status)
    if entry is None or not _is_worth_it(view, status, entry):
        return ()
    hung = entry.pod if entry.reason == Reason.HANG else None
    members = [pod for pod in view.pods.values() if pod.name != hung and (survives(view, pod) or is_coming(pod))]
    # Where none is lost, the gang itself is at fault: a fabric that failed between well pods.
    if len(members) == view.num_nodes and entry.reason not in REGROUPS:
        return ()
    standing_by = [pod for pod in view.standbys.values() if survives(view, pod)]
    kept = sorted([*members, *standing_by], key=lambda pod: pod.fell_back)
    return tuple(kept[: elastic.next_size(view, status, len(kept))])


def members_of_next(view: View, kept: tuple[ObservedPod, ...], size: int) -> tuple[Member, ...]:
    """The pod of each node rank of the next attempt: a pod that is kept keeps its rank where there is still one."""
    rank_of = {pod.uid: rank for rank, pod in view.pods.items()}
    places: list[Member | None] = [None] * size
    homeless = []
    for pod in kept:
        rank = rank_of.get(pod.uid, size)
        member = Member(pod.attempt, pod.node_rank)
        if rank < size:
            places[rank] = member
        else:
            homeless.append(member)
    for rank, place in enumerate(places):
        if place is None:
            places[rank] = homeless.pop(0) if homeless else Member(view.attempt + 1, rank)
    return tuple(place for place in places if place is not None)


def is_saving(view: View, status: FineTuneJobStatus, kept: tuple[ObservedPod, ...]) -> bool:
    """Whether survivors are still busy with the save that a notice, or the end of the attempt, gives them time for.

    After a failure of the program they have a moment to show whether they fail of the same thing.
    """
    entry = current(status)
    until = _busy_until(view, entry) if entry is not None and kept else None
    if until is None or view.now >= until:
        return False
    return not all(received.beat.waiting for pod in kept if (received := view.heard(pod)) is not None)


def _busy_until(view: View, entry: AttemptStatus) -> datetime | None:
    if may_save(entry, view):
        return notice_over_at(entry, view)
    return believe_at(entry, view) if entry.counts_as == CountsAs.FAILURE else None


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When a survivor has been silent for so long that it is none any more, or the notice is over."""
    entry = current(status)
    kept = survivors(view, status)
    if entry is None or not kept:
        return None
    moments: list[datetime | None] = [_silent_at(view, pod) for pod in kept]
    if is_saving(view, status, kept):
        moments.append(_busy_until(view, entry))
    return earliest(moments)


def is_possible(view: View) -> bool:
    """Whether supervisors can be told of another world, and wait for one."""
    return bool(view.settings.coordinator_url and view.settings.hold_seconds)


def survives(view: View, pod: ObservedPod) -> bool:
    """Whether a pod is good for another attempt."""
    received, silent_at = view.heard(pod), _silent_at(view, pod)
    if received is None or silent_at is None or received.beat.notice or view.now >= silent_at:
        return False
    if pod.phase is not PodPhase.RUNNING or has_ended(pod) or pod.deleted_at is not None:
        return False
    fine = all(end.exit_code in HOLDABLE for end in received.beat.ends)
    return fine and pod.disruption is None and pod.reason is None


def is_coming(pod: ObservedPod) -> bool:
    """Whether a pod has a node and pulls its image there: a new one would only do so again."""
    going = pod.deleted_at is not None or pod.disruption is not None or pod.reason is not None
    failing = pod.waiting is not None and pod.waiting.startswith(IMAGE_ERRORS)
    return pod.phase is PodPhase.PENDING and pod.node is not None and not going and not failing


def _is_worth_it(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> bool:
    if entry.reason is None or entry.attempt != view.attempt or is_finished(status):
        return False
    if not is_possible(view) or view.spec.suspend:
        return False
    if entry.reason in REGROUPS:
        return True
    was_whole = entry.seconds.pulling is not None
    failed_in_place = bool(entry.pod_attempts) and was_whole and entry.training_at is None
    return entry.counts_as is not None and entry.reason not in WITH_OWN_GRACE and not failed_in_place


def _silent_at(view: View, pod: ObservedPod) -> datetime | None:
    received = view.heard(pod)
    if received is None:
        return None
    return received.received_at + silence(view.observed, view.settings)
