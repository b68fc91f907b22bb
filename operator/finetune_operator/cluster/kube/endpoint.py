"""Sends the supervisors to the replica that leads: the EndpointSlice of the coordinator's service is the leader's.

The service has no selector, so nobody else writes its endpoints. A replica that begins to lead puts its own address
there; all beats come to it from then on.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from finetune_operator.api import words
from finetune_operator.cluster.kube.client import ApiError, Json, KubeApi
from finetune_operator.cluster.kube.objects import ENDPOINT_SLICES

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
            await api.apply(path, build_slice(endpoint), manager=words.OPERATOR)
        except ApiError as error:
            if not error.passing:
                raise
            log.warning("cannot write the coordinator's endpoint yet: %s", error)
            await asyncio.sleep(error.retry_after_seconds or RETRY_SECONDS)
        else:
            return


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
