"""The headless service that gives the pods of a job names, for pods that cannot ask where rank 0 is."""

from __future__ import annotations

from typing import Any

from finetune_operator.api import labels
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import service_name
from finetune_operator.manifests.metadata import build_metadata, job_labels
from finetune_operator.settings import Settings


def build_service(job: FineTuneJob, settings: Settings) -> dict[str, Any]:
    """Return the service of a job, which serves all attempts: the names of pods contain their attempt.

    The ranks meet in the pod of node rank 0, so only its name is resolved; selecting more pods would cost two endpoint
    writes for every change of every pod. In an elastic job any pod can become node rank 0 of a smaller gang.
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
