"""Builds the PodDisruptionBudget of a running gang. Pure."""

from __future__ import annotations

from typing import Any

from finetune_operator.api import labels
from finetune_operator.api.job import FineTuneJob
from finetune_operator.manifests.metadata import build_metadata, job_labels

API_VERSION = "policy/v1"
KIND = "PodDisruptionBudget"


def budget_name(job: str, attempt: int) -> str:
    """Return the name of the budget of an attempt: the number of pods that it requires may not change."""
    return f"{job}-a{attempt}"


def build_disruption_budget(job: FineTuneJob, attempt: int, size: int) -> dict[str, Any]:
    """Return a budget that permits no eviction while `size` pods of the job are ready.

    A number of pods, because a percentage needs an owner with the scale subresource.
    """
    own = job_labels(job.metadata.name)
    name = budget_name(job.metadata.name, attempt)
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": build_metadata(job, name, own | {labels.ATTEMPT: str(attempt)}),
        "spec": {
            "minAvailable": size,
            "selector": {"matchLabels": own},
            # A gang with a pod that is not ready does not train: nothing is protected by keeping that pod.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }
