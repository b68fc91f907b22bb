"""Which beats count: the pure half of the coordinator. Called by `server`, read by the cluster for `Observed.beats`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from finetune_contract.heartbeat import Heartbeat
from finetune_operator.plan.model.types import ReceivedHeartbeat


@dataclass(frozen=True)
class PodIdentity:
    """The pod that a bearer token was issued to, as the cluster answers for it."""

    namespace: str
    job: str
    pod: str
    pod_uid: str


def mismatch(identity: PodIdentity, beat: Heartbeat) -> str | None:
    """Say in a sentence what a beat claims that its token does not prove; None where all agrees."""
    claims = {
        "namespace": (beat.namespace, identity.namespace),
        "job": (beat.job, identity.job),
        "pod": (beat.pod, identity.pod),
        "podUid": (beat.pod_uid, identity.pod_uid),
    }
    for field, (claimed, proved) in claims.items():
        if claimed != proved:
            return f"the beat's {field} is {claimed!r}, but its token was issued to {proved!r}"
    return None


class BeatBook:
    """The newest beat of each pod."""

    def __init__(self) -> None:
        self._newest: dict[str, ReceivedHeartbeat] = {}

    def take(self, beat: Heartbeat, received_at: datetime) -> bool:
        """Keep a beat unless a newer one of its pod is there; say whether anything but the sequence changed."""
        known = self._newest.get(beat.pod_uid)
        if known is not None and beat.sequence <= known.beat.sequence:
            return False
        self._newest[beat.pod_uid] = ReceivedHeartbeat(beat, received_at)
        return known is None or beat.model_copy(update={"sequence": known.beat.sequence}) != known.beat

    def of(self, namespace: str, job: str, oldest_attempt: int = 0) -> Mapping[str, ReceivedHeartbeat]:
        """The newest beats of a job's pods, by UID, those of gone pods included: a copy that later beats do not change.

        What older attempts said is dropped for good.
        """
        mine = {uid: got for uid, got in self._newest.items() if (got.beat.namespace, got.beat.job) == (namespace, job)}
        for uid in [uid for uid, got in mine.items() if got.beat.attempt < oldest_attempt]:
            del self._newest[uid], mine[uid]
        return MappingProxyType(mine)
