"""How urgent a change is: at once for what ends or begins something, a little later for what is merely progress.

Later changes of the same job are then seen in one pass and cost one status write. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from finetune_contract.heartbeat import Heartbeat, RankReport, RankState
from finetune_operator.api.job import AttemptStatus, FineTuneJobStatus
from finetune_operator.cluster.kube.client.objects import KubeJob, KubePod
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.types import ObservedPod
from finetune_operator.plan.model.view import ENDED


class Urgency(Enum):
    """When a change wants a pass."""

    NOW = "now"
    SOON = "soon"
    """Once the changes that are likely to come with it had time to."""
    PROGRESS = "progress"
    """Within the budget of status writes."""
    NEVER = "never"


@dataclass(frozen=True)
class Gang:
    """What the pods of an attempt have come to."""

    size: int
    num_pods: int
    num_ready: int
    over: bool
    """Whether the attempt's end is in the status: its pods are only being cleared away."""

    @property
    def is_ready(self) -> bool:
        """Whether all of them are."""
        return self.num_ready == self.num_pods == self.size


def is_over(status: FineTuneJobStatus, attempt: int) -> bool:
    """Whether an attempt's end and its cause are in the status."""
    entry = current(status)
    return entry is None or attempt < entry.attempt or (attempt == entry.attempt and entry.reason is not None)


def pod_news(old: KubePod | None, new: KubePod | None, gang: Gang) -> Urgency:
    """Judge a change of a pod, and what its gang has come to by it.

    Bad news at once, for every second of them is paid for by a whole gang. Of a gang that is being cleared away the
    ends count, and the last pod. Of one that is being made, that all are ready: each step before would cost a write.
    """
    if new is None:
        return Urgency.PROGRESS if gang.over and gang.num_pods else Urgency.NOW
    if old is not None and old.observed == new.observed:
        return Urgency.NEVER
    if gang.over:
        ended = new.observed.phase in ENDED and (old is None or old.observed.phase not in ENDED)
        return Urgency.NOW if ended else Urgency.PROGRESS
    bad = _bad(new.observed)
    if bad and (old is None or bad != _bad(old.observed)):
        return Urgency.NOW
    return Urgency.SOON if gang.is_ready else Urgency.PROGRESS


def _bad(pod: ObservedPod) -> tuple[object, ...]:
    """All that tells of an end; empty where nothing does."""
    signs = (pod.deleted_at, pod.disruption, pod.exit_code, pod.reason, pod.phase if pod.phase in ENDED else None)
    return signs if any(sign is not None for sign in signs) else ()


def job_news(old: KubeJob | None, new: KubeJob | None) -> Urgency:
    """Judge a change of a job, our own status writes included.

    At once where its attempts have begun or ended, for then there is something to do; and after every edit of it. A
    status that tells of anything else seldom leads to another one, and one of mere progress only to its like.
    """
    if old is None or new is None or old.job is None or new.job is None or old.uid != new.uid:
        return Urgency.NOW
    if old.job.metadata.generation != new.job.metadata.generation:
        return Urgency.NOW
    if is_progress(old.job.status, new.job.status):
        return Urgency.PROGRESS
    same = _course(old.job.status) == _course(new.job.status)
    return Urgency.SOON if same else Urgency.NOW


def _course(status: FineTuneJobStatus) -> list[object]:
    """What attempts there were, and how each of them ended."""
    return [status.attempt, *((entry.attempt, entry.ended_at, entry.reason) for entry in status.attempts)]


PROGRESS = frozenset(
    {"step", "progress", "eta", "loss", "images_per_second", "nodes", "message", "goodput", "last_checkpoint", "tally"}
)
"""Fields of the status that change all the time while nothing begins or ends."""


def is_progress(old: FineTuneJobStatus, new: FineTuneJobStatus) -> bool:
    """Whether one status differs from another one in nothing but progress."""
    changed = {name for name, value in new if getattr(old, name) != value}
    if "attempts" in changed and _milestones(old) == _milestones(new):
        changed.remove("attempts")
    return changed <= PROGRESS


def _milestones(status: FineTuneJobStatus) -> list[AttemptStatus]:
    """The ledger without what of it is progress."""
    return [entry.model_copy(update={"to_step": None, "progress_at": None}) for entry in status.attempts]


def beat_news(old: Heartbeat | None, new: Heartbeat) -> Urgency:
    """Judge a beat by the last one of the same pod."""
    if _alarm(new) and (old is None or _alarm(old) != _alarm(new)):
        return Urgency.NOW
    if old is None or _states(old) != _states(new):
        return Urgency.SOON
    return Urgency.PROGRESS if old.model_copy(update={"sequence": new.sequence}) != new else Urgency.NEVER


FINAL = frozenset({RankState.FAILED, RankState.SAVED, RankState.DONE})


def _alarm(beat: Heartbeat) -> tuple[object, ...]:
    """All that tells of an end; empty where nothing does."""
    states = tuple((rank.rank, rank.state) for rank in beat.ranks if rank.state in FINAL)
    return (beat.notice, beat.ends, states) if beat.notice or beat.ends or states else ()


def _states(beat: Heartbeat) -> list[tuple[object, ...]]:
    return [_state(rank) for rank in beat.ranks]


def _state(rank: RankReport) -> tuple[object, ...]:
    return rank.rank, rank.state, rank.warnings, rank.outputs, rank.checkpoint is None
