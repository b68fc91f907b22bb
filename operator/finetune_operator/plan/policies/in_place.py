"""In-place recovery: selects the pods of an ended attempt that the next one keeps, and their node ranks.

The supervisors of kept pods receive the new world (see `replies`) and restart their ranks there. Image, caches and
node are kept, and only the missing pods are scheduled. Standby pods (see `standby`) are kept in the same way. Recovery
in place is tried once: if such an attempt had all its pods and ended before its first step, the next attempt replaces
the complete gang.
"""

from __future__ import annotations

from datetime import datetime

from finetune_contract.exit_codes import HOLDABLE
from finetune_operator.api.reasons import REGROUPS, CountsAs, Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model import admission
from finetune_operator.plan.model.grace import WITH_OWN_GRACE, may_save, notice_expires_at
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.listening import first_heard_by, silent_at
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import IMAGE_ERRORS, ObservedPod, PodPhase
from finetune_operator.plan.model.view import Member, View, earliest, has_ended, is_finished
from finetune_operator.plan.policies.capacity import elastic
from finetune_operator.plan.policies.endings import cause_certain_at


def survivors(view: View, status: FineTuneJobStatus) -> tuple[ObservedPod, ...]:
    """Return the pods to keep: they run, send heartbeats, and only lack a peer.

    Pods that an operator which has just started has not heard yet are among them. At most as many as the next attempt
    has ranks; pods that fell back to other nodes than spot are dropped first.
    """
    entry = current(status)
    if entry is None or not _is_allowed(view, status, entry):
        return ()
    bad = entry.pod if entry.reason in {Reason.HANG, Reason.GPU_FAULT} else None
    members = [
        pod for pod in view.pods.values() if pod.name != bad and (_may_survive(view, pod) or is_coming(view, pod))
    ]
    # If no pod is lost, the gang itself is at fault: the network failed between healthy pods.
    if len(members) == view.num_nodes and entry.reason not in REGROUPS:
        return ()
    standbys = [pod for pod in view.standbys.values() if _may_survive(view, pod)]
    kept = sorted([*members, *standbys], key=lambda pod: pod.fell_back)
    return tuple(kept[: elastic.next_size(view, status, len(kept))])


def members_of_next(view: View, kept: tuple[ObservedPod, ...], size: int) -> tuple[Member, ...]:
    """Return the pod of each node rank of the next attempt: a kept pod keeps its rank if that rank still exists."""
    rank_of = {pod.uid: rank for rank, pod in view.pods.items()}
    members: list[Member | None] = [None] * size
    unassigned = []
    for pod in kept:
        rank = rank_of.get(pod.uid, size)
        member = Member(pod.attempt, pod.node_rank)
        if rank < size:
            members[rank] = member
        else:
            unassigned.append(member)
    for rank, assigned in enumerate(members):
        if assigned is None:
            members[rank] = unassigned.pop(0) if unassigned else Member(view.attempt + 1, rank)
    return tuple(member for member in members if member is not None)


def is_saving(view: View, status: FineTuneJobStatus, kept: tuple[ObservedPod, ...]) -> bool:
    """Return whether survivors may still be saving, within the time that the notice or the end of the attempt allows.

    After a failure of the program they get a moment in which they may fail with the same error.
    """
    entry = current(status)
    until = _busy_until(view, entry) if entry is not None and kept else None
    if until is None or view.now >= until:
        return False
    return not all(received.beat.waiting for pod in kept if (received := view.heartbeat_of(pod)) is not None)


def _busy_until(view: View, entry: AttemptStatus) -> datetime | None:
    if may_save(entry, view):
        return notice_expires_at(entry, view)
    return cause_certain_at(entry, view) if entry.counts_as == CountsAs.FAILURE else None


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when a survivor has been silent for too long to be kept, or its notice expires."""
    entry = current(status)
    kept = survivors(view, status)
    if entry is None or not kept:
        return None
    moments: list[datetime | None] = [_silent_at(view, pod) for pod in kept]
    if is_saving(view, status, kept):
        moments.append(_busy_until(view, entry))
    return earliest(moments)


def is_possible(view: View) -> bool:
    """Return whether supervisors can receive another world, and wait for one."""
    return bool(view.settings.coordinator_url and view.settings.hold_seconds)


def survives(view: View, pod: ObservedPod) -> bool:
    """Return whether a pod can serve another attempt: it is healthy, and contains the newest edit of the spec."""
    return view.heartbeat_of(pod) is not None and _may_survive(view, pod)


def _may_survive(view: View, pod: ObservedPod) -> bool:
    """Return whether a pod can serve another attempt, as far as it has been heard."""
    received, due = view.heartbeat_of(pod), _silent_at(view, pod)
    if due is None or view.now >= due:
        return False
    if received is not None:
        healthy = all(end.exit_code in HOLDABLE for end in received.beat.ends)
        if not healthy or received.beat.notice or received.beat.gpu_faults:
            return False
    if pod.phase is not PodPhase.RUNNING or has_ended(pod) or pod.deleted_at is not None:
        return False
    return pod.disruption is None and pod.reason is None and not view.is_outdated(pod)


def is_coming(view: View, pod: ObservedPod) -> bool:
    """Return whether a pod has a node and pulls its image there: a new pod would only do the same again."""
    if view.is_outdated(pod):
        return False
    leaving = pod.deleted_at is not None or pod.disruption is not None or pod.reason is not None
    failing = pod.waiting is not None and pod.waiting.startswith(IMAGE_ERRORS)
    return pod.phase is PodPhase.PENDING and pod.node is not None and not leaving and not failing


def _is_allowed(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> bool:
    """Return whether the end of the attempt allows recovery in place."""
    if entry.reason is None or entry.attempt != view.attempt or is_finished(status):
        return False
    if not is_possible(view) or view.spec.suspend:
        return False
    if admission.must_ask_again(view) or not admission.may_run(view):
        # The quota is requested again, or released, when no pod is left.
        return False
    if entry.reason in REGROUPS:
        return True
    was_complete = entry.seconds.pulling is not None
    failed_in_place = bool(entry.pod_attempts) and was_complete and entry.training_at is None
    if entry.counts_as in (None, CountsAs.OUTAGE):
        # During an outage the nodes are free for other jobs.
        return False
    return entry.reason not in WITH_OWN_GRACE and not failed_in_place


def _silent_at(view: View, pod: ObservedPod) -> datetime | None:
    """Return when a pod counts as silent; None: it has sent no heartbeat, and nobody has listened."""
    received = view.heartbeat_of(pod)
    if received is None:
        return first_heard_by(view.observed, view.settings)
    return silent_at(received, view.observed, view.settings)


POLICY = Policy("in-place", wake=wake)
