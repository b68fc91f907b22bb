"""The host of the rendezvous, and the headless service that gives its pod a name."""

from __future__ import annotations

from typing import Any

from finetune_operator.api import labels
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import pod_host, service_name
from finetune_operator.manifests.metadata import build_metadata, job_labels
from finetune_operator.settings import Settings

LOOPBACK = "127.0.0.1"


def rendezvous_host(job: FineTuneJob, first_pod: tuple[int, int], num_nodes: int) -> str:
    """Return the host where the ranks of a gang meet. Those of a single pod need no name, and so no service.

    Args:
        job: the job.
        first_pod: attempt and node rank in the name of node rank 0's pod.
        num_nodes: number of pods of the gang.
    """
    if num_nodes == 1:
        return LOOPBACK
    return pod_host(job.metadata.name, *first_pod, job.metadata.namespace)


def build_service(job: FineTuneJob, settings: Settings) -> dict[str, Any]:
    """Return the service of a job, which serves all attempts: the names of pods contain their attempt.

    The rendezvous runs in the pod of node rank 0, so only its name is resolved; selecting more pods would cost two
    endpoint writes for every change of every pod. In an elastic job any pod can become node rank 0 of a smaller gang.
    """
    name = job.metadata.name
    # No other label is needed, and the endpoint controllers compare each one with all pods of the namespace.
    selector = {labels.JOB: name}
    if job.spec.topology.max_nodes is None:
        selector |= {labels.NODE_RANK: "0"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": build_metadata(job, service_name(name), job_labels(name)),
        "spec": {
            "clusterIP": "None",
            "selector": selector,
            # Ranks resolve the name of rank 0 before its pod is ready.
            "publishNotReadyAddresses": True,
            "ports": [{"name": "rendezvous", "port": settings.rendezvous_port, "protocol": "TCP"}],
        },
    }
