"""The headless service that gives the pod where the ranks meet its host name."""

from __future__ import annotations

from typing import Any

from finetune_operator.api import labels
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import service_name
from finetune_operator.manifests.metadata import build_metadata, job_labels
from finetune_operator.settings import Settings


def build_service(job: FineTuneJob, settings: Settings) -> dict[str, Any]:
    """One service for all attempts: a pod's name holds its attempt.

    The ranks meet at the pod of node rank 0, and only its name is looked up; each pod more would cost the cluster two
    endpoint writes for every step of its life. In an elastic job any pod may be the first of a smaller world.
    """
    name = job.metadata.name
    selector = job_labels(name)
    if job.spec.topology.max_nodes is None:
        selector |= {labels.NODE_RANK: "0"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": build_metadata(job, service_name(name), job_labels(name)),
        "spec": {
            "clusterIP": "None",
            "selector": selector,
            # Ranks look for rank 0 before anything of it is ready.
            "publishNotReadyAddresses": True,
            "ports": [{"name": "rendezvous", "port": settings.rendezvous_port, "protocol": "TCP"}],
        },
    }
