"""The coordinator's endpoint on a cluster: over TLS, and no pod may ask more of it than its share."""

from __future__ import annotations

import asyncio

from finetune_operator.cluster.kube.beats.limits import RateLimit
from finetune_operator.cluster.kube.cluster import KubeCluster
from finetune_operator.cluster.protocol import Clock
from finetune_operator.coordinator.beats import PodIdentity
from finetune_operator.coordinator.server import Coordinator, Refused

BEATS_PER_SECOND = 2.0
BURST_BEATS = 30.0
"""A supervisor beats at every change of its ranks: a start has many of them, close together."""


class SecureCoordinator(Coordinator):
    """Serves all jobs of a KubeCluster."""

    def __init__(self, cluster: KubeCluster, clock: Clock) -> None:
        self._cluster = cluster
        self._limit = RateLimit(BEATS_PER_SECOND, BURST_BEATS)
        # The book tells the cluster of news by itself: it alone knows how urgent they are.
        super().__init__(cluster.beats, self._review_within_limit, cluster.answer, lambda *_: None, clock)

    async def _review_within_limit(self, token: str) -> PodIdentity | None:
        identity = await self._cluster.whose_token(token)
        if identity is not None and not self._limit.allow(identity.pod_uid, asyncio.get_running_loop().time()):
            raise Refused(429, f"more than {BEATS_PER_SECOND:g} beats a second from one pod: beat less often")
        return identity
