"""What all objects of a job share: its namespace, its labels, and the job as their owner."""

from __future__ import annotations

from typing import Any

from finetune_operator.api import labels, names
from finetune_operator.api.job import API_VERSION, KIND, FineTuneJob


def job_labels(job: str) -> dict[str, str]:
    """Labels of everything that belongs to a job."""
    return {labels.MANAGED_BY: names.OPERATOR, labels.JOB: job}


def pod_labels(job: str, attempt: int, node_rank: int) -> dict[str, str]:
    """Labels of a pod: the plan reads its attempt and its node rank from them."""
    return job_labels(job) | {labels.ATTEMPT: str(attempt), labels.NODE_RANK: str(node_rank)}


def build_metadata(job: FineTuneJob, name: str, labels: dict[str, str]) -> dict[str, Any]:
    """Metadata of an object that goes when the job goes."""
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        # Deleting the job in the foreground waits for its pods, and so for their last checkpoint.
        "blockOwnerDeletion": True,
    }
    return {"name": name, "namespace": job.metadata.namespace, "labels": labels, "ownerReferences": [owner]}
