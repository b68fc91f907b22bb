"""Names of a job's children. They depend on the job and the attempt only, so that a create can be repeated."""

from __future__ import annotations

OPERATOR = "finetune-operator"
"""The operator's name as field manager, as event source and as value of MANAGED_BY."""
CONTAINER = "trainer"
"""Name of the container that runs the supervisor; a container of this name in podTemplate is merged over it."""
MAX_LABEL = 63
"""Longest DNS label: the names of pods are host names."""
MAX_ATTEMPT = 99_999
"""Most attempts that the length of the names allows; at one every ten minutes, two years."""
MAX_NODES = 1000
"""Most pods of a job; the bound of topology.nodes."""


def pod_name(job: str, attempt: int, node_rank: int) -> str:
    """Return the name of a pod, which is also its host name, e.g. 'circles-a2-n0'."""
    return f"{job}-a{attempt}-n{node_rank}"


def export_pod_name(job: str) -> str:
    """Return the name of the pod that writes outputs outside of the gang; a job has at most one at a time."""
    return f"{job}-export"


def service_name(job: str) -> str:
    """Return the name of the headless service that a job may have, which is also the subdomain of its pods."""
    return job


def config_name(job: str) -> str:
    """Return the name of the ConfigMap that holds the run spec."""
    return f"{job}-run"


def pod_host(job: str, attempt: int, node_rank: int, namespace: str) -> str:
    """Return the DNS name that a pod has if its job has a service, relative to the cluster's domain."""
    return f"{pod_name(job, attempt, node_rank)}.{service_name(job)}.{namespace}.svc"


MAX_JOB_NAME = MAX_LABEL - max(
    len(pod_name("", MAX_ATTEMPT, MAX_NODES - 1)), len(export_pod_name("")), len(config_name(""))
)
"""Longest name of a job: the name of its longest child must be a DNS label."""
