"""Authentication of bearer tokens by TokenReview. A result is cached while the token is valid and its pod exists."""

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

MAX_CACHED = 20_000
"""Results in the cache; the least recently used ones are dropped first."""
REFUSAL_SECONDS = 30.0
"""Time for which a refusal is cached, so that repeated invalid tokens do not cause requests to the API server."""
MAX_REVIEWS = 16
"""Maximum number of concurrent reviews."""
REVIEW_SECONDS = 10.0
POD_NAME = "authentication.kubernetes.io/pod-name"
POD_UID = "authentication.kubernetes.io/pod-uid"


@dataclass(frozen=True, slots=True)
class BoundPod:
    """The pod that a token is bound to."""

    namespace: str
    pod: str
    pod_uid: str


FindPod = Callable[[BoundPod], PodIdentity | None]
"""Returns the identity of an existing pod of a job; None if there is none."""


class TokenReviewer:
    """Sends TokenReviews and caches their results."""

    def __init__(self, api: KubeApi, audience: str, find: FindPod, wall: Callable[[], float] = time.time) -> None:
        self._api = api
        self._audience = audience
        self._find = find
        self._wall = wall
        self._cached: OrderedDict[bytes, tuple[BoundPod | None, float]] = OrderedDict()
        self._reviews = asyncio.Semaphore(MAX_REVIEWS)

    async def authenticate(self, token: str) -> PodIdentity | None:
        """Return the pod of a token; None if the token is not valid or its pod is deleted."""
        # The key is a digest, so that a memory dump contains no tokens.
        digest = hashlib.sha256(token.encode()).digest()
        cached = self._cached.get(digest)
        if cached is None or cached[1] <= self._wall():
            cached = await self._review(token, digest)
        else:
            self._cached.move_to_end(digest)
        bound = cached[0] if cached is not None else None
        return self._find(bound) if bound is not None else None

    async def _review(self, token: str, digest: bytes) -> tuple[BoundPod | None, float] | None:
        spec = {"token": token, "audiences": [self._audience]}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        async with self._reviews:
            try:
                review = await self._api.request(
                    "POST", TOKEN_REVIEWS.path(), body, seconds=REVIEW_SECONDS, without_lease=True
                )
            except ApiError:
                # The token could not be checked: the request is refused, and the supervisor continues and retries.
                return None
        bound = parse_review(review, self._audience)
        expires = token_expiry(token) if bound is not None else self._wall() + REFUSAL_SECONDS
        result = (bound, expires)
        self._cached[digest] = result
        if len(self._cached) > MAX_CACHED:
            self._cached.popitem(last=False)
        return result


def parse_review(review: Json, audience: str) -> BoundPod | None:
    """Return the pod that a review names; None if the token is refused, has another audience, or has no pod."""
    status: dict[str, Any] = review.get("status") or {}
    if not status.get("authenticated") or audience not in (status.get("audiences") or ()):
        return None
    user = status["user"]
    extra = user.get("extra") or {}
    names, uids = extra.get(POD_NAME), extra.get(POD_UID)
    parts = user["username"].split(":")
    if not names or not uids or parts[:2] != ["system", "serviceaccount"]:
        return None
    return BoundPod(parts[2], names[0], uids[0])


def token_expiry(token: str) -> float:
    """Return when a valid token expires, in seconds since the epoch; 0 if it does not contain this."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError):
        return 0.0
