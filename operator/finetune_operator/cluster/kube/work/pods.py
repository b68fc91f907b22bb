"""Requests about pods, also those that an API server may not serve. `KubeCluster` makes them through this.

None of them fails a reconcile because the API server is too old: the job runs without the feature, or is refused with a
message.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from finetune_operator.api.gangs import GATE
from finetune_operator.api.names import CONTAINER
from finetune_operator.cluster.kube.client.client import (
    BAD_REQUEST,
    CONFLICT,
    NOT_FOUND,
    STRATEGIC,
    STRICT,
    ApiError,
    Json,
    KubeApi,
    delete_if_present,
)
from finetune_operator.cluster.kube.client.objects import PODS
from finetune_operator.plan.model.types import DeletePod, Manifest, OpenGate, ResizePod

log = logging.getLogger(__name__)

CLAIMS = "/apis/resource.k8s.io"
RETRY_SECONDS = 60.0
"""Interval at which the operator looks for an API that was not served."""
REFUSED = frozenset({BAD_REQUEST, 403, NOT_FOUND, 422})
"""Status codes after which a repeated resize would be refused again."""


class PodRequests:
    """Creates, changes and deletes pods, and asks for the API of resource claims."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self._has_checked_users = False
        self._unserved_at: float | None = None
        self._refused: dict[str, str] = {}

    async def create(self, namespace: str, manifest: Manifest) -> Json:
        """Create a pod and return its metadata. The first one with a user namespace shows whether the field is kept.

        Raises:
            ApiError: the pod is refused.
        """
        path = PODS.path(namespace)
        if self._has_checked_users or manifest["spec"].get("hostUsers") is not False:
            return await self._api.create(path, manifest)
        created = await self._api.request("POST", path, manifest, query=STRICT)
        self._has_checked_users = True
        if created["spec"].get("hostUsers") is not False:
            log.warning(
                "the API server ignores hostUsers: pods run without a user namespace of their own; that needs "
                "Kubernetes 1.33 or newer, or the feature gate UserNamespacesSupport"
            )
        return created

    async def delete(self, namespace: str, action: DeletePod) -> Json | None:
        """Delete a pod, and return it if it still exists; None also if another pod has its name."""
        options: dict[str, Any] = {"preconditions": {"uid": action.uid}}
        if action.grace_seconds is not None:
            options["gracePeriodSeconds"] = action.grace_seconds
        answer = await delete_if_present(self._api, PODS.path(namespace, action.name), options)
        is_pod = answer is not None and answer.get("kind") == "Pod"
        return answer if answer is not None and is_pod and answer["metadata"].get("deletionTimestamp") else None

    async def open_gate(self, namespace: str, action: OpenGate) -> Json | None:
        """Remove the operator's scheduling gate from a pod; gates of others stay. Return the pod if it still exists."""
        gates = {"schedulingGates": [{"$patch": "delete", "name": GATE}]}
        change = {"metadata": {"uid": action.uid}, "spec": gates}
        try:
            return await self._api.request("PATCH", PODS.path(namespace, action.name), change, content_type=STRATEGIC)
        except ApiError as error:
            if error.status not in (CONFLICT, NOT_FOUND):
                raise
            return None

    async def serves_claims(self) -> bool:
        """Return whether the API server serves ResourceClaims; an answer that they are missing is kept for a minute."""
        now = asyncio.get_running_loop().time()
        if self._unserved_at is not None and now < self._unserved_at + RETRY_SECONDS:
            return False
        try:
            await self._api.get(CLAIMS)
        except ApiError as error:
            self._unserved_at = now if error.status == NOT_FOUND else None
            return error.status != NOT_FOUND
        self._unserved_at = None
        return True

    async def resize(self, namespace: str, action: ResizePod) -> Json | None:
        """Change the memory of a pod and return the pod; None: it stays as it is.

        A refusal is logged once: the pod was healthy with the memory that it has.

        Raises:
            ApiError: the API server does not answer.
        """
        if self._refused.get(action.uid) == action.memory:
            return None
        try:
            return await self._api.request(
                "PATCH", PODS.path(namespace, action.name, "resize"), _resize_body(action), content_type=STRATEGIC
            )
        except ApiError as error:
            if error.status == CONFLICT:
                return None
            if error.status not in REFUSED:
                raise
            self._refused[action.uid] = action.memory
            log.warning("the memory of the pod %s cannot be raised to %s: %s", action.name, action.memory, error)
            return None

    def forget(self, uid: str) -> None:
        """Forget a deleted pod."""
        self._refused.pop(uid, None)


def _resize_body(action: ResizePod) -> dict[str, Any]:
    amounts = {"memory": action.memory}
    container = {"name": CONTAINER, "resources": {"requests": amounts, "limits": amounts}}
    return {"metadata": {"uid": action.uid}, "spec": {"containers": [container]}}
