"""The ConfigMap that carries the run specification to the pods."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import config_name
from finetune_operator.manifests.layout import RUN_SPEC_KEY
from finetune_operator.manifests.metadata import build_metadata, job_labels
from finetune_operator.manifests.run_spec import build_run_spec


def build_config(job: FineTuneJob) -> dict[str, Any]:
    """Return the ConfigMap of a job; all attempts read the same one."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": build_metadata(job, config_name(job.metadata.name), job_labels(job.metadata.name)),
        "data": {RUN_SPEC_KEY: build_run_spec(job).to_json()},
    }
