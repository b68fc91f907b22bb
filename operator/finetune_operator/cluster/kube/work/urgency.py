"""Urgency of a change: immediate if something starts or ends, delayed if it is only progress.

Several delayed changes of the same job then need only one reconcile and one status write. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from finetune_contract.heartbeat import Heartbeat, RankReport, RankState
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.labels import EXPORT
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.cluster.kube.client.objects import KubeJob, KubePod
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.types import ObservedPod
from finetune_operator.plan.model.view import ENDED, members_of


class Urgency(Enum):
    """Time limit within which a change requires a reconcile."""

    NOW = "now"
    SOON = "soon"
    """After a short delay, in which related changes arrive."""
    PROGRESS = "progress"
    """Within the rate limit of status writes."""
    NEVER = "never"


@dataclass(frozen=True)
class GangReadiness:
    """Number of existing, ready and leaving pods of an attempt."""

    size: int
    num_pods: int
    num_ready: int
    num_leaving: int
    """Number of pods that are being deleted."""
    ended: bool
    """Whether the status contains the attempt's end: its pods are being deleted, or kept for the next attempt."""

    @property
    def is_ready(self) -> bool:
        """Return whether all pods exist and are ready."""
        return self.num_ready == self.num_pods == self.size


def attempt_has_ended(status: FineTuneJobStatus, attempt: int) -> bool:
    """Return whether the status contains an attempt's end and its cause."""
    entry = current(status)
    return entry is None or attempt < entry.attempt or (attempt == entry.attempt and entry.reason is not None)


def measure_gang(job: FineTuneJob, pod: ObservedPod, pods: Sequence[ObservedPod]) -> GangReadiness:
    """Return how many pods of a pod's attempt exist and are ready, given all pods of its job."""
    members = members_of(job.status, job.spec)
    attempt = pod.attempt
    if (attempt, pod.node_rank) in members:
        # A pod that an in-place recovery kept counts as a pod of the newest attempt.
        attempt = job.status.attempt
        pods = [other for other in pods if (other.attempt, other.node_rank) in members]
    else:
        pods = [other for other in pods if other.attempt == attempt]
    return GangReadiness(
        size=len(members),
        num_pods=len(pods),
        num_ready=sum(other.ready for other in pods),
        num_leaving=sum(other.deleted_at is not None for other in pods),
        ended=attempt_has_ended(job.status, attempt),
    )


def classify_pod_change(old: KubePod | None, new: KubePod | None, gang: GangReadiness) -> Urgency:
    """Return the urgency of a change of a pod in its gang.

    A failure is immediate, because the complete gang waits for every second of delay. While pods of an ended attempt
    are deleted, only an ended pod and the last deleted one are: then the next attempt begins, with the pods that are
    kept, if there are any. While a gang starts, only the last ready pod is urgent, and the last gated one, because the
    gang waits for its gates: a reconcile for each earlier step would cost a status write.
    """
    if new is None:
        return Urgency.PROGRESS if gang.ended and gang.num_leaving else Urgency.NOW
    if old is not None and old.observed == new.observed:
        return Urgency.NEVER
    if gang.ended:
        ended = new.observed.phase in ENDED and (old is None or old.observed.phase not in ENDED)
        return Urgency.NOW if ended else Urgency.PROGRESS
    signals = _pod_end_signals(new.observed)
    if signals and (old is None or signals != _pod_end_signals(old.observed)):
        return Urgency.NOW
    if new.observed.gated and gang.num_pods == gang.size:
        return Urgency.NOW
    return Urgency.SOON if gang.is_ready else Urgency.PROGRESS


def moves_the_meeting(job: FineTuneJob, old: KubePod | None, new: KubePod | None) -> bool:
    """Return whether the ranks of a job meet in this pod, and it can be reached from now on, or at another address."""
    if new is None or not new.observed.reachable_at:
        return False
    if old is not None and old.observed.reachable_at == new.observed.reachable_at:
        return False
    return members_of(job.status, job.spec)[0] == (new.observed.attempt, new.observed.node_rank)


def _pod_end_signals(pod: ObservedPod) -> tuple[object, ...]:
    """Return all signs that a pod ends; empty if there are none."""
    signs = (pod.deleted_at, pod.disruption, pod.exit_code, pod.reason, pod.phase if pod.phase in ENDED else None)
    return signs if any(sign is not None for sign in signs) else ()


def classify_job_change(old: KubeJob | None, new: KubeJob | None) -> Urgency:
    """Return the urgency of a change of a job, including our own status writes.

    Immediate if an attempt has started or ended, because actions follow, and after every edit of the job. Other status
    changes rarely lead to another one, and progress only to more progress.
    """
    if old is None or new is None or old.job is None or new.job is None or old.uid != new.uid:
        return Urgency.NOW
    before, after = old.job.metadata, new.job.metadata
    if before.generation != after.generation or before.annotations.get(EXPORT) != after.annotations.get(EXPORT):
        return Urgency.NOW
    if is_progress(old.job.status, new.job.status):
        return Urgency.PROGRESS
    same = _attempt_history(old.job.status) == _attempt_history(new.job.status)
    return Urgency.SOON if same else Urgency.NOW


def _attempt_history(status: FineTuneJobStatus) -> list[object]:
    """Return the attempts and how each of them ended."""
    return [status.attempt, *((entry.attempt, entry.ended_at, entry.reason) for entry in status.attempts)]


PROGRESS_FIELDS = frozenset(
    {
        "step",
        "progress",
        "eta",
        "loss",
        "images_per_second",
        "performance",
        "nodes",
        "message",
        "goodput",
        "last_checkpoint",
        "tally",
        "writes",
    }
)
"""Status fields that change continuously while nothing starts or ends."""


def is_progress(old: FineTuneJobStatus, new: FineTuneJobStatus) -> bool:
    """Return whether two statuses differ only in progress."""
    changed = {name for name, value in new if getattr(old, name) != value}
    if "attempts" in changed and _milestones(old) == _milestones(new):
        changed.remove("attempts")
    return changed <= PROGRESS_FIELDS


def _milestones(status: FineTuneJobStatus) -> list[AttemptStatus]:
    """Return the ledger without its progress fields."""
    return [_without_progress(entry) for entry in status.attempts]


def _without_progress(entry: AttemptStatus) -> AttemptStatus:
    """Return an entry without its progress fields.

    Until all pods run, these include which pods exist and where: one write reports the complete gang. A pod that
    disappears before that is created again.
    """
    changes: dict[str, object] = {"to_step": None, "progress_at": None}
    if entry.seconds.pulling is None:
        seconds = entry.seconds.model_copy(update={"queueing": None})
        changes |= {"gang_complete": False, "pod_nodes": None, "seconds": seconds}
    return entry.model_copy(update=changes)


def classify_heartbeat(old: Heartbeat | None, new: Heartbeat) -> Urgency:
    """Return the urgency of a heartbeat, compared with the previous one of the same pod."""
    if _heartbeat_end_signals(new) and (old is None or _heartbeat_end_signals(old) != _heartbeat_end_signals(new)):
        return Urgency.NOW
    if old is None or _rank_states(old) != _rank_states(new):
        return Urgency.SOON
    return Urgency.PROGRESS if old.model_copy(update={"sequence": new.sequence}) != new else Urgency.NEVER


FINAL_STATES = frozenset({RankState.FAILED, RankState.SAVED, RankState.DONE})


def _heartbeat_end_signals(beat: Heartbeat) -> tuple[object, ...]:
    """Return all signs that ranks end or have ended, for which the next attempt may wait; empty if there are none."""
    states = tuple((rank.rank, rank.state) for rank in beat.ranks if rank.state in FINAL_STATES)
    signs = (beat.notice, beat.waiting, beat.ends, beat.gpu_faults, states)
    return signs if any(signs) else ()


def _rank_states(beat: Heartbeat) -> list[tuple[object, ...]]:
    return [_rank_state(rank) for rank in beat.ranks]


def _rank_state(rank: RankReport) -> tuple[object, ...]:
    return rank.rank, rank.state, rank.warnings, rank.outputs, rank.checkpoint is None
