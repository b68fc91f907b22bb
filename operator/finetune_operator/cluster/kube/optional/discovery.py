"""Looks for APIs that a cluster may not serve, or may serve later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from finetune_operator.cluster.kube.client.client import NOT_FOUND, ApiError, KubeApi
from finetune_operator.cluster.kube.client.objects import Resource

log = logging.getLogger(__name__)
DISCOVERY_SECONDS = 60.0
"""Interval at which the operator looks for an API that is not served yet."""


async def find_served(api: KubeApi, candidates: Sequence[Resource]) -> Resource | None:
    """Return the first resource that the API server serves; None if it serves none.

    Raises:
        ApiError: the API server cannot be asked.
    """
    for resource in candidates:
        try:
            found = await api.get(resource.root)
        except ApiError as error:
            if error.status == NOT_FOUND:
                continue
            raise
        # An API version may be served without some of its resources: they are behind feature gates.
        if any(each["name"] == resource.plural for each in found.get("resources") or ()):
            return resource
    return None


async def try_find_served(api: KubeApi, candidates: Sequence[Resource]) -> Resource | None:
    """Return the first resource that the API server serves; None also if it cannot be asked now."""
    try:
        return await find_served(api, candidates)
    except ApiError as error:
        log.warning("cannot ask for %s; retrying in %.0f s: %s", candidates[0].root, DISCOVERY_SECONDS, error)
        return None


async def wait_until_served(api: KubeApi, candidates: Sequence[Resource]) -> Resource:
    """Wait until the API server serves one of the resources, and return it."""
    while True:
        await asyncio.sleep(DISCOVERY_SECONDS)
        if (found := await try_find_served(api, candidates)) is not None:
            return found
