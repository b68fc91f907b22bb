"""Sends the supervisors to the replica that leads: the EndpointSlice of the coordinator's service is the leader's.

The service has no selector, so nobody else writes its endpoints. A replica that begins to lead puts its own address
there; all beats come to it from then on.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.api import words
from finetune_operator.cluster.kube.client import Json, KubeApi
from finetune_operator.cluster.kube.objects import ENDPOINT_SLICES


@dataclass(frozen=True)
class Endpoint:
    """Where the coordinator of this replica listens."""

    namespace: str
    service: str
    address: str
    port: int


async def publish(api: KubeApi, endpoint: Endpoint) -> None:
    """Put this replica into the service.

    Raises:
        ApiError: it could not be written.
    """
    path = ENDPOINT_SLICES.path(endpoint.namespace, endpoint.service)
    await api.apply(path, build_slice(endpoint), manager=words.OPERATOR)


def build_slice(endpoint: Endpoint) -> Json:
    """The slice with one endpoint."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": endpoint.service,
            "namespace": endpoint.namespace,
            "labels": {
                "kubernetes.io/service-name": endpoint.service,
                "endpointslice.kubernetes.io/managed-by": words.OPERATOR,
            },
        },
        "addressType": "IPv6" if ":" in endpoint.address else "IPv4",
        "endpoints": [{"addresses": [endpoint.address], "conditions": {"ready": True}}],
        "ports": [{"name": "beats", "port": endpoint.port, "protocol": "TCP"}],
    }
