"""Routes heartbeats to the leader: the EndpointSlice of the coordinator's Service contains the leader's address.

The Service has no selector, so no controller writes its endpoints. A replica that becomes the leader writes its own
address; from then on it receives all heartbeats.
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
class LeaderEndpoint:
    """Address of this replica's coordinator, and the Service that it belongs to."""

    namespace: str
    service: str
    address: str
    port: int


async def publish_endpoint(api: KubeApi, endpoint: LeaderEndpoint) -> None:
    """Make this replica the endpoint of the Service; retry while the API server is not available.

    Raises:
        ApiError: the API server refuses the write.
    """
    path = ENDPOINT_SLICES.path(endpoint.namespace, endpoint.service)
    while True:
        try:
            uid = await _service_uid(api, endpoint)
            await api.apply(path, build_slice(endpoint, uid), manager=names.OPERATOR)
        except ApiError as error:
            if not error.transient:
                raise
            log.warning("cannot write the coordinator's endpoint; retrying: %s", error)
            await asyncio.sleep(error.retry_after_seconds or RETRY_SECONDS)
        else:
            return


async def _service_uid(api: KubeApi, endpoint: LeaderEndpoint) -> str:
    try:
        service = await api.get(SERVICES.path(endpoint.namespace, endpoint.service))
    except ApiError as error:
        if error.status != NOT_FOUND:
            raise
        return ""
    uid: str = service["metadata"]["uid"]
    return uid


def build_slice(endpoint: LeaderEndpoint, service_uid: str = "") -> Json:
    """Return the EndpointSlice with one endpoint. If the Service's UID is known, the Service owns it."""
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
