"""The coordinator's endpoint on a cluster, with a rate limit for each pod."""

from __future__ import annotations

import asyncio

from finetune_operator.cluster.kube.beats.rate_limit import RateLimit
from finetune_operator.cluster.protocol import Clock
from finetune_operator.coordinator.beats import HeartbeatStore, PodIdentity
from finetune_operator.coordinator.changes import JobChanges
from finetune_operator.coordinator.server import Answer, Authenticator, Coordinator, HeartbeatRefusedError

BEATS_PER_SECOND = 2.0
BURST_BEATS = 30.0
"""A supervisor sends a heartbeat at every change of its ranks: a start causes many of them within a short time."""


class RateLimitedCoordinator(Coordinator):
    """Serves all jobs of a cluster. The store itself wakes the jobs, by the urgency of each heartbeat."""

    def __init__(
        self, store: HeartbeatStore, authenticate: Authenticator, answer: Answer, clock: Clock, changes: JobChanges
    ) -> None:
        self._authenticate_token = authenticate
        self._limit = RateLimit(BEATS_PER_SECOND, BURST_BEATS)
        super().__init__(store, self._authenticate_within_limit, answer, lambda *_: None, clock, changes=changes)

    async def _authenticate_within_limit(self, token: str) -> PodIdentity | None:
        identity = await self._authenticate_token(token)
        if identity is not None and not self._limit.allow(identity.pod_uid, asyncio.get_running_loop().time()):
            message = f"more than {BEATS_PER_SECOND:g} heartbeats per second from one pod: send fewer heartbeats"
            raise HeartbeatRefusedError(429, message)
        return identity
