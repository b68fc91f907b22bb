"""Whose bearer token it is: a TokenReview, kept as long as the token lives and its pod does."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_operator.cluster.kube.client.client import ApiError, Json, KubeApi
from finetune_operator.cluster.kube.client.objects import TOKEN_REVIEWS
from finetune_operator.coordinator.beats import PodIdentity

MAX_KEPT = 20_000
"""Answers kept; the ones that were not asked for longest go first."""
REFUSAL_SECONDS = 30.0
"""How long a refusal is kept, so that a stranger's tokens do not become requests to the API server."""
MAX_REVIEWS = 16
"""Reviews under way at a time."""
REVIEW_SECONDS = 10.0
POD_NAME = "authentication.kubernetes.io/pod-name"
POD_UID = "authentication.kubernetes.io/pod-uid"


@dataclass(frozen=True, slots=True)
class Bearer:
    """The pod that a token is bound to."""

    namespace: str
    pod: str
    pod_uid: str


FindPod = Callable[[Bearer], PodIdentity | None]
"""The living pod of a job; None: there is none."""


class TokenReviewer:
    """Asks the API server, and remembers."""

    def __init__(self, api: KubeApi, audience: str, find: FindPod, wall: Callable[[], float] = time.time) -> None:
        self._api = api
        self._audience = audience
        self._find = find
        self._wall = wall
        self._kept: OrderedDict[bytes, tuple[Bearer | None, float]] = OrderedDict()
        self._reviews = asyncio.Semaphore(MAX_REVIEWS)

    async def whose(self, token: str) -> PodIdentity | None:
        """The pod of a token; None where it is nobody's, or the pod is gone."""
        # Kept by digest: a dump of the memory shows no tokens.
        digest = hashlib.sha256(token.encode()).digest()
        kept = self._kept.get(digest)
        if kept is None or kept[1] <= self._wall():
            kept = await self._review(token, digest)
        else:
            self._kept.move_to_end(digest)
        bearer = kept[0] if kept is not None else None
        return self._find(bearer) if bearer is not None else None

    async def _review(self, token: str, digest: bytes) -> tuple[Bearer | None, float] | None:
        spec = {"token": token, "audiences": [self._audience]}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        async with self._reviews:
            try:
                review = await self._api.request("POST", TOKEN_REVIEWS.path(), body, seconds=REVIEW_SECONDS, unled=True)
            except ApiError:
                # Nothing is known of the token: its supervisor is refused for now, goes on, and tries again.
                return None
        bearer = read_review(review, self._audience)
        expires = expiry(token) if bearer is not None else self._wall() + REFUSAL_SECONDS
        answer = (bearer, expires)
        self._kept[digest] = answer
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return answer


def read_review(review: Json, audience: str) -> Bearer | None:
    """The pod that a review names; None where the token is refused, for others, or bound to no pod."""
    status: dict[str, Any] = review.get("status") or {}
    if not status.get("authenticated") or audience not in (status.get("audiences") or ()):
        return None
    user = status["user"]
    extra = user.get("extra") or {}
    names, uids = extra.get(POD_NAME), extra.get(POD_UID)
    parts = user["username"].split(":")
    if not names or not uids or parts[:2] != ["system", "serviceaccount"]:
        return None
    return Bearer(parts[2], names[0], uids[0])


def expiry(token: str) -> float:
    """When a token that was found to be good ends, in seconds since the epoch; 0 where it does not say."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError):
        return 0.0
