"""How urgent a change is: at once for what ends or begins something, a little later for what is merely progress.

Later changes of the same job are then seen in one pass and cost one status write. Pure.
"""

from __future__ import annotations

from enum import Enum

from finetune_contract.beat import Beat, RankReport, RankState
from finetune_operator.cluster.kube.objects import KubePod
from finetune_operator.plan.types import ObservedPod
from finetune_operator.plan.view import ENDED


class Urgency(Enum):
    """When a change wants a pass."""

    NOW = "now"
    SOON = "soon"
    """Once the changes that are likely to come with it had time to."""
    PROGRESS = "progress"
    """Within the budget of status writes."""
    NEVER = "never"


def pod_news(old: KubePod | None, new: KubePod | None) -> Urgency:
    """Judge a change of a pod: bad news at once, for every second of them is paid for by a whole gang."""
    if new is None:
        return Urgency.NOW
    if old is not None and old.observed == new.observed:
        return Urgency.NEVER
    bad = _bad(new.observed)
    return Urgency.NOW if bad and (old is None or bad != _bad(old.observed)) else Urgency.SOON


def _bad(pod: ObservedPod) -> tuple[object, ...]:
    """All that tells of an end; empty where nothing does."""
    signs = (pod.deleted_at, pod.disruption, pod.exit_code, pod.reason, pod.phase if pod.phase in ENDED else None)
    return signs if any(sign is not None for sign in signs) else ()


def beat_news(old: Beat | None, new: Beat) -> Urgency:
    """Judge a beat by the last one of the same pod."""
    if _alarm(new) and (old is None or _alarm(old) != _alarm(new)):
        return Urgency.NOW
    if old is None or _states(old) != _states(new):
        return Urgency.SOON
    return Urgency.PROGRESS if old.model_copy(update={"sequence": new.sequence}) != new else Urgency.NEVER


FINAL = frozenset({RankState.FAILED, RankState.SAVED, RankState.DONE})


def _alarm(beat: Beat) -> tuple[object, ...]:
    """All that tells of an end; empty where nothing does."""
    states = tuple((rank.rank, rank.state) for rank in beat.ranks if rank.state in FINAL)
    return (beat.notice, beat.ends, states) if beat.notice or beat.ends or states else ()


def _states(beat: Beat) -> list[tuple[object, ...]]:
    return [_state(rank) for rank in beat.ranks]


def _state(rank: RankReport) -> tuple[object, ...]:
    return rank.rank, rank.state, rank.warnings, rank.outputs, rank.checkpoint is None
