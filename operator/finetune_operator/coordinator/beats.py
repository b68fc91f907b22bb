"""Storage of the newest heartbeats: the pure part of the coordinator. The cluster reads it for `Observed.beats`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from finetune_contract.heartbeat import Heartbeat
from finetune_operator.plan.model.types import ReceivedHeartbeat


@dataclass(frozen=True)
class PodIdentity:
    """The pod that a bearer token was issued to, as confirmed by the cluster."""

    namespace: str
    job: str
    pod: str
    pod_uid: str


def find_mismatch(identity: PodIdentity, beat: Heartbeat) -> str | None:
    """Return a message about the first field of a heartbeat that its token does not confirm; None if all agree."""
    claims = {
        "namespace": (beat.namespace, identity.namespace),
        "job": (beat.job, identity.job),
        "pod": (beat.pod, identity.pod),
        "podUid": (beat.pod_uid, identity.pod_uid),
    }
    for field, (claimed, confirmed) in claims.items():
        if claimed != confirmed:
            return f"the heartbeat's {field} is {claimed!r}, but its token was issued for {confirmed!r}"
    return None


class HeartbeatStore:
    """The newest heartbeat of each pod."""

    def __init__(self) -> None:
        self._newest: dict[str, ReceivedHeartbeat] = {}

    def record(self, beat: Heartbeat, received_at: datetime) -> bool:
        """Store a heartbeat unless a newer one of its pod is stored; return whether more than the sequence changed."""
        known = self._newest.get(beat.pod_uid)
        if known is not None and beat.sequence <= known.beat.sequence:
            return False
        self._newest[beat.pod_uid] = ReceivedHeartbeat(beat, received_at)
        return known is None or beat.model_copy(update={"sequence": known.beat.sequence}) != known.beat

    def of_job(self, namespace: str, job: str, oldest_attempt: int = 0) -> Mapping[str, ReceivedHeartbeat]:
        """Return the newest heartbeats of a job's pods, by UID, including those of deleted pods.

        The mapping is a copy that later heartbeats do not change. Heartbeats of older attempts are dropped.
        """
        mine = {uid: got for uid, got in self._newest.items() if (got.beat.namespace, got.beat.job) == (namespace, job)}
        for uid in [uid for uid, got in mine.items() if got.beat.attempt < oldest_attempt]:
            del self._newest[uid], mine[uid]
        return MappingProxyType(mine)
