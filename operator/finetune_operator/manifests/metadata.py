"""Metadata of all objects of a job: namespace, labels, and the job as owner."""

from __future__ import annotations

from typing import Any

from finetune_operator.api import labels, names
from finetune_operator.api.job import API_VERSION, KIND, FineTuneJob


def job_labels(job: str) -> dict[str, str]:
    """Return the labels of every object of a job."""
    return {labels.MANAGED_BY: names.OPERATOR, labels.JOB: job}


def pod_labels(job: str, attempt: int, node_rank: int) -> dict[str, str]:
    """Return the labels of a pod; the plan reads the attempt and the node rank from them."""
    return job_labels(job) | {labels.ATTEMPT: str(attempt), labels.NODE_RANK: str(node_rank)}


def build_metadata(job: FineTuneJob, name: str, labels: dict[str, str]) -> dict[str, Any]:
    """Return the metadata of an object that Kubernetes deletes together with the job."""
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        # A foreground deletion of the job waits for its pods, and so for their last checkpoint.
        "blockOwnerDeletion": True,
    }
    return {"name": name, "namespace": job.metadata.namespace, "labels": labels, "ownerReferences": [owner]}
