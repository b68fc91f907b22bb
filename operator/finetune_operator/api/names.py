"""Names of a job's children. They follow from the job and the attempt alone, so that a create can be repeated."""

from __future__ import annotations

OPERATOR = "finetune-operator"
"""Our name as a field manager, an event source and the value of MANAGED_BY."""
CONTAINER = "trainer"
"""Name of the container that runs the supervisor; podTemplate's container of this name is merged over it."""
MAX_LABEL = 63
"""Longest DNS label: pods are named by their host names."""
MAX_ATTEMPT = 99_999
"""Attempts that the names have room for; at one every ten minutes, two years."""
MAX_NODES = 1000
"""Most pods of a job, the bound of topology.nodes."""


def pod_name(job: str, attempt: int, node_rank: int) -> str:
    """Name of a pod, which is also its host name, e.g. 'circles-a2-n0'."""
    return f"{job}-a{attempt}-n{node_rank}"


def service_name(job: str) -> str:
    """Name of the headless service, which is also the pods' subdomain."""
    return job


def config_name(job: str) -> str:
    """Name of the ConfigMap that holds the run spec."""
    return f"{job}-run"


def pod_host(job: str, attempt: int, node_rank: int, namespace: str) -> str:
    """Name by which a pod's peers find it. Relative to the cluster's domain, whatever that is."""
    return f"{pod_name(job, attempt, node_rank)}.{service_name(job)}.{namespace}.svc"


MAX_JOB_NAME = MAX_LABEL - max(len(pod_name("", MAX_ATTEMPT, MAX_NODES - 1)), len(config_name("")))
"""Longest name of a job: its longest child's must still be a DNS label."""
