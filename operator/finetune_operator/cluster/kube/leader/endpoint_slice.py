"""Sends the supervisors to the replica that leads: the EndpointSlice of the coordinator's service is the leader's.

The service has no selector, so nobody else writes its endpoints. A replica that begins to lead puts its own address
there; all beats come to it from then on.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from finetune_operator.api import names
from finetune_operator.cluster.kube.client.client import NOT_FOUND, ApiError, Json, KubeApi
from finetune_operator.cluster.kube.client.objects import ENDPOINT_SLICES, SERVICES

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Endpoint:
    """Where the coordinator of this replica listens."""

    namespace: str
    service: str
    address: str
    port: int


async def publish(api: KubeApi, endpoint: Endpoint) -> None:
    """Put this replica into the service; try again while the API server cannot take it.

    Raises:
        ApiError: it is refused.
    """
    path = ENDPOINT_SLICES.path(endpoint.namespace, endpoint.service)
    while True:
        try:
            uid = await _service_uid(api, endpoint)
            await api.apply(path, build_slice(endpoint, uid), manager=names.OPERATOR)
        except ApiError as error:
            if not error.passing:
                raise
            log.warning("cannot write the coordinator's endpoint yet: %s", error)
            await asyncio.sleep(error.retry_after_seconds or RETRY_SECONDS)
        else:
            return


async def _service_uid(api: KubeApi, endpoint: Endpoint) -> str:
    try:
        service = await api.get(SERVICES.path(endpoint.namespace, endpoint.service))
    except ApiError as error:
        if error.status != NOT_FOUND:
            raise
        return ""
    uid: str = service["metadata"]["uid"]
    return uid


def build_slice(endpoint: Endpoint, service_uid: str = "") -> Json:
    """The slice with one endpoint. It goes with its service, where that one's UID is known."""
    owner = {"apiVersion": "v1", "kind": "Service", "name": endpoint.service, "uid": service_uid}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": endpoint.service,
            "namespace": endpoint.namespace,
            "labels": {
                "kubernetes.io/service-name": endpoint.service,
                "endpointslice.kubernetes.io/managed-by": names.OPERATOR,
            },
            "ownerReferences": [owner] if service_uid else [],
        },
        "addressType": "IPv6" if ":" in endpoint.address else "IPv4",
        "endpoints": [{"addresses": [endpoint.address], "conditions": {"ready": True}}],
        "ports": [{"name": "beats", "port": endpoint.port, "protocol": "TCP"}],
    }
