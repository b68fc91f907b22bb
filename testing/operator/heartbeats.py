"""Heartbeats as the supervisors of a job's pods send them: over TLS, with tokens from the API server."""

from __future__ import annotations

import contextlib
import http.client
import ssl
from dataclasses import dataclass
from typing import Any

from finetune_contract.heartbeat import BEAT_PATH, Heartbeat, RankReport, RankState
from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.process import LOOPBACK
from testing.controlplane.server import ControlPlane
from testing.operator.harness import HOME, Jobs, OperatorProcess

AUDIENCE = "finetune-coordinator"
SERVICE = "finetune-coordinator"


@dataclass
class HeartbeatClient:
    """Sends heartbeats for the pods of the job `circles`."""

    jobs: Jobs
    operator: OperatorProcess
    context: ssl.SSLContext

    def token(self, pod: str, audience: str = AUDIENCE) -> str:
        exists = self.jobs.pods()[pod]
        return self.jobs.control_plane.token_for("default", self.jobs.namespace, audiences=[audience], pod=exists)

    def beat(self, pod: str, sequence: int, *, attempt: int = 0, **report: Any) -> Heartbeat:
        """Return a heartbeat of a pod's only rank; attempt: 0 means the attempt that the pod was created for."""
        meta = self.jobs.pods()[pod]["metadata"]
        given = {"rank": int(pod[-1]), "state": RankState.TRAINING, "step": sequence, "total_steps": 100}
        return Heartbeat(
            job="circles",
            namespace=self.jobs.namespace,
            job_uid=meta["ownerReferences"][0]["uid"],
            pod=pod,
            pod_uid=meta["uid"],
            attempt=attempt or int(meta["labels"]["finetune-operator.io/attempt"]),
            node_rank=int(pod[-1]),
            sequence=sequence,
            ranks=(RankReport.model_validate(given | report),),
        )

    def post(self, beat: Heartbeat, token: str) -> tuple[int, str]:
        connection = http.client.HTTPSConnection(LOOPBACK, self.operator.coordinator_port, context=self.context)
        try:
            connection.request("POST", BEAT_PATH, beat.to_json(), {"Authorization": f"Bearer {token}"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


def create_service(cluster: ControlPlane) -> str:
    """Create the coordinator's Service, as the chart does, unless it exists; return its UID."""
    path = f"/api/v1/namespaces/{HOME}/services"
    service = {"metadata": {"name": SERVICE}, "spec": {"ports": [{"name": "beats", "port": 8443}]}}
    with contextlib.suppress(ControlPlaneApiError):
        cluster.api.create(path, {"apiVersion": "v1", "kind": "Service", **service})
    uid: str = cluster.api.get(f"{path}/{SERVICE}")["metadata"]["uid"]
    return uid


def tls_flags(cluster: ControlPlane) -> tuple[str, ...]:
    certificate = cluster.authority.issue("coordinator", hosts=[LOOPBACK])
    create_service(cluster)
    return (
        f"--coordinator-tls-cert={certificate.certificate}",
        f"--coordinator-tls-key={certificate.key}",
        f"--coordinator-service={SERVICE}",
        "--pod-ip=10.0.0.1",
        "--coordinator-url=https://finetune-coordinator.finetune-system.svc:8443",
        "--progress-seconds=0.5",
    )


def tls_context(cluster: ControlPlane) -> ssl.SSLContext:
    """Return a TLS context that trusts the coordinator."""
    return ssl.create_default_context(cafile=str(cluster.authority.certificate))
