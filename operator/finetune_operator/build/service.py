"""The headless service that gives the pods their host names."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import service_name
from finetune_operator.build.metadata import build_metadata, job_labels
from finetune_operator.settings import Settings


def build_service(job: FineTuneJob, settings: Settings) -> dict[str, Any]:
    """One service for all attempts: a pod's name holds its attempt."""
    labels = job_labels(job.metadata.name)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": build_metadata(job, service_name(job.metadata.name), labels),
        "spec": {
            "clusterIP": "None",
            "selector": labels,
            # Ranks look for rank 0 before anything of it is ready.
            "publishNotReadyAddresses": True,
            "ports": [{"name": "rendezvous", "port": settings.rendezvous_port, "protocol": "TCP"}],
        },
    }
