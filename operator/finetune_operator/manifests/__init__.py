"""Builds the manifests of a job's objects. Pure functions of the job, the attempt and the settings."""

from finetune_operator.manifests.config import build_config
from finetune_operator.manifests.pods import PodOptions, build_pod
from finetune_operator.manifests.run_spec import build_run_spec, build_target, global_batch, hash_target, num_nodes
from finetune_operator.manifests.service import build_service
from finetune_operator.manifests.template import hash_template

__all__ = [
    "PodOptions",
    "build_config",
    "build_pod",
    "build_run_spec",
    "build_service",
    "build_target",
    "global_batch",
    "hash_target",
    "hash_template",
    "num_nodes",
]
