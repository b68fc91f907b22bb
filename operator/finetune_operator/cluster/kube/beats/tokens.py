"""Authentication of bearer tokens: by their signature, or else by TokenReview.

A result is cached while the token is valid and its pod exists.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from finetune_operator.cluster.kube.beats.attention import ListeningClock
from finetune_operator.cluster.kube.beats.signatures import BoundPod, TokenKeys, UnknownKeyError
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
RETRY_SECONDS = 30.0
"""Time within which a supervisor whose token could not be reviewed sends its next heartbeat."""
POD_NAME = "authentication.kubernetes.io/pod-name"
POD_UID = "authentication.kubernetes.io/pod-uid"


FindPod = Callable[[BoundPod], PodIdentity | None]
"""Returns the identity of an existing pod of a job; None if there is none."""


class TokenReviewer:
    """Verifies tokens, reviews those that it cannot verify, and caches the results."""

    def __init__(
        self,
        api: KubeApi,
        audience: str,
        find: FindPod,
        attention: ListeningClock,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._audience = audience
        self._find = find
        self._wall = wall
        self._attention = attention
        self._keys = TokenKeys(api, audience, wall)
        self._cached: OrderedDict[bytes, tuple[BoundPod | None, float]] = OrderedDict()
        self._reviews = asyncio.Semaphore(MAX_REVIEWS)

    async def authenticate(self, token: str) -> PodIdentity | None:
        """Return the pod of a token; None if the token is not valid or its pod is deleted."""
        # The key is a digest, so that a memory dump contains no tokens.
        digest = hashlib.sha256(token.encode()).digest()
        cached = self._cached.get(digest)
        if cached is None or cached[1] <= self._wall():
            cached = await self._check(token, digest)
        else:
            self._cached.move_to_end(digest)
        bound = cached[0] if cached is not None else None
        return self._find(bound) if bound is not None else None

    async def _check(self, token: str, digest: bytes) -> tuple[BoundPod | None, float] | None:
        """Return the result for a token that is not cached; None if the API server cannot review it now."""
        try:
            # The heartbeats of all pods whose tokens are being checked are not received yet.
            with self._attention.waiting():
                bound = await self._verify_or_review(token)
        except ApiError:
            # The request is refused, and the supervisor continues and retries.
            self._attention.record_failure(RETRY_SECONDS)
            return None
        expires = token_expiry(token) if bound is not None else self._wall() + REFUSAL_SECONDS
        result = (bound, expires)
        self._cached[digest] = result
        if len(self._cached) > MAX_CACHED:
            self._cached.popitem(last=False)
        return result

    async def _verify_or_review(self, token: str) -> BoundPod | None:
        async with self._reviews:
            try:
                return await self._keys.verify(token)
            except UnknownKeyError:
                pass
            spec = {"token": token, "audiences": [self._audience]}
            body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
            review = await self._api.request(
                "POST", TOKEN_REVIEWS.path(), body, seconds=REVIEW_SECONDS, without_lease=True
            )
        return parse_review(review, self._audience)


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
