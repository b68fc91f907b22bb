"""Routes heartbeats to the leader: the EndpointSlice of the coordinator's Service contains the leader's address.

The Service has no selector, so no controller writes its endpoints. A replica that becomes the leader writes its own
address; from then on it receives all heartbeats. It writes the slice again and again, because anybody may delete it,
and the garbage collector deletes it together with its Service.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from finetune_operator.api import names
from finetune_operator.cluster.kube.client.client import (
    LEADER_SECONDS,
    NOT_FOUND,
    ApiError,
    Json,
    KubeApi,
    NotLeaderError,
)
from finetune_operator.cluster.kube.client.objects import ENDPOINT_SLICES, SERVICES

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
CHECK_SECONDS = 3.0


@dataclass(frozen=True)
class LeaderEndpoint:
    """Address of this replica's coordinator, and the Service that it belongs to."""

    namespace: str
    service: str
    address: str
    port: int


class EndpointPublisher:
    """Makes this replica the only endpoint of the Service, and keeps it."""

    def __init__(self, api: KubeApi, endpoint: LeaderEndpoint) -> None:
        self._api = api
        self._endpoint = endpoint
        self._written: tuple[str, str] | None = None
        """UID and resource version of the slice after the last write."""
        self.problem = ""
        """Why no heartbeat can arrive; empty if the endpoint is published."""

    async def publish(self) -> None:
        """Write the slice; retry while the API server is not available or the lease is renewed late.

        If it cannot be written for another reason, log and keep the `problem`.
        """
        while True:
            try:
                self._set_problem(await self._write())
            except ApiError as error:
                if not error.transient:
                    self._set_problem(f"the API server refuses the endpoint of {self._name}: {error}")
                    return
                log.warning("cannot write the coordinator's endpoint; retrying: %s", error)
                await asyncio.sleep(error.retry_after_seconds or RETRY_SECONDS)
            except NotLeaderError:
                await asyncio.sleep(LEADER_SECONDS)
            else:
                return

    async def keep(self, check_seconds: float = CHECK_SECONDS) -> None:
        """Write the slice periodically. A write without a change costs the API server no write to its database."""
        while True:
            await asyncio.sleep(check_seconds)
            await self.publish()

    @property
    def _name(self) -> str:
        return f"Service {self._endpoint.namespace}/{self._endpoint.service}"

    async def _write(self) -> str:
        """Write the slice of an existing Service; return the problem."""
        endpoint = self._endpoint
        try:
            service = await self._api.get(SERVICES.path(endpoint.namespace, endpoint.service))
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise
            # A slice without an owner would stay after the chart was uninstalled.
            return f"{self._name} does not exist: run `helm upgrade` with the chart of this release to create it again"
        path = ENDPOINT_SLICES.path(endpoint.namespace, endpoint.service)
        slice_ = await self._api.apply(path, build_slice(endpoint, service["metadata"]["uid"]), manager=names.OPERATOR)
        self._note_change((slice_["metadata"]["uid"], slice_["metadata"]["resourceVersion"]))
        return ""

    def _note_change(self, written: tuple[str, str]) -> None:
        if self._written is not None and written != self._written:
            what = "deleted" if written[0] != self._written[0] else "changed"
            log.warning("the coordinator's endpoint was %s by somebody else; wrote it again", what)
        self._written = written

    def _set_problem(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.error("no heartbeats can arrive: %s", problem)
        elif self.problem and not problem:
            log.info("heartbeats can arrive again: %s has its endpoint", self._name)
        self.problem = problem


def build_slice(endpoint: LeaderEndpoint, service_uid: str) -> Json:
    """Return the EndpointSlice with one endpoint. The Service owns it."""
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
            "ownerReferences": [owner],
        },
        "addressType": "IPv6" if ":" in endpoint.address else "IPv4",
        "endpoints": [{"addresses": [endpoint.address], "conditions": {"ready": True}}],
        "ports": [{"name": "beats", "port": endpoint.port, "protocol": "TCP"}],
    }
