"""One pod of a gang: the manifest that a real API server and the local cluster both get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_operator.api.job import Accelerator, Capacity, FineTuneJob
from finetune_operator.api.labels import CAPACITY
from finetune_operator.api.names import CONTAINER, pod_name, service_name
from finetune_operator.manifests import layout
from finetune_operator.manifests.env import Place, build_env
from finetune_operator.manifests.merge import MergeError, merge
from finetune_operator.manifests.metadata import build_metadata, pod_labels
from finetune_operator.manifests.placement import build_placement
from finetune_operator.manifests.resources import build_resources
from finetune_operator.manifests.run_spec import num_nodes
from finetune_operator.manifests.volumes import build_volumes
from finetune_operator.settings import Settings

TEMPLATE_FIELDS = ("metadata", "spec")


@dataclass(frozen=True)
class Surroundings:
    """What a pod's place depends on beside its own numbers."""

    num_nodes: int | None = None
    """Pods of its gang; None: as many as the spec asks for."""
    first_pod: tuple[int, int] | None = None
    """Attempt and number of node rank 0's pod, where that one was kept; None: it is of this pod's attempt."""
    capacity: Capacity | None = None
    """Nodes that it may take, where that is not simply what the spec says."""
    mtbf_seconds: float | None = None
    """Mean time between the job's interruptions so far."""
    stands_by: bool = False
    """Whether it belongs to no gang yet: its ranks wait for the next world."""
    avoid: tuple[str, ...] = ()
    """Names of nodes to be taken only where there are no others."""


ALONE = Surroundings()


def build_pod(
    job: FineTuneJob, attempt: int, node_rank: int, settings: Settings, around: Surroundings = ALONE
) -> dict[str, Any]:
    """The pod of one node rank (from 0) in one attempt (from 1), with `spec.podTemplate` laid over it.

    Raises:
        MergeError: the template cannot be laid over it, or leaves no pod that trains.
    """
    identity = _identity(job, attempt, node_rank)
    if around.capacity is not None:
        identity["metadata"]["labels"][CAPACITY] = around.capacity.value
    size = around.num_nodes or num_nodes(job.spec)
    place = Place(attempt, node_rank, size, around.first_pod or (attempt, 0), around.stands_by, around.mtbf_seconds)
    spec = _pod_spec(job, build_env(job, place, settings), settings, around.capacity)
    _avoid(spec, around.avoid)
    pod = {**identity, "spec": spec | identity["spec"]}
    if not job.spec.pod_template:
        return pod
    # The template comes over what is rendered, and the identity once more over the template: whatever it says, the
    # pod stays the one that the plan looks for.
    pod = merge(merge(pod, _template(job.spec.pod_template)), identity)
    if not _has_trainer(pod):
        raise MergeError(f"it takes the container {CONTAINER} away; leave it in and write only what is to differ in it")
    return pod


def _template(template: dict[str, Any]) -> dict[str, Any]:
    """The job's PodTemplateSpec. The API server would leave out without a word what it has no field for."""
    for name in template:
        if name not in TEMPLATE_FIELDS:
            raise MergeError(f"{name} is no field of a PodTemplateSpec; write it below spec or metadata")
    return template


def _has_trainer(pod: dict[str, Any]) -> bool:
    """Whether the container that trains is there; what a template puts in its place may have any form."""
    containers = pod["spec"].get("containers")
    if not isinstance(containers, list):
        return False
    return any(isinstance(container, dict) and container.get("name") == CONTAINER for container in containers)


def _identity(job: FineTuneJob, attempt: int, node_rank: int) -> dict[str, Any]:
    name = pod_name(job.metadata.name, attempt, node_rank)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": build_metadata(job, name, pod_labels(job.metadata.name, attempt, node_rank)),
        "spec": {
            "hostname": name,
            "subdomain": service_name(job.metadata.name),
            # A pod that ended is an attempt that ended: the next attempt has new pods.
            "restartPolicy": "Never",
        },
    }


def _pod_spec(
    job: FineTuneJob, env: list[dict[str, Any]], settings: Settings, capacity: Capacity | None
) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": job.spec.recovery.notice_seconds,
        "securityContext": _pod_security(settings),
        "containers": [_container(job, env, settings)],
        "volumes": [volume for volume, _ in build_volumes(job, settings)],
        **build_placement(job, capacity),
    }
    if job.spec.priority_class_name:
        spec["priorityClassName"] = job.spec.priority_class_name
    return spec


def _avoid(spec: dict[str, Any], nodes: Sequence[str]) -> None:
    """Add a preference: a job that fits on no other node must not wait for ever."""
    if not nodes:
        return
    term = {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": list(nodes)}]}
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    affinity.setdefault("preferredDuringSchedulingIgnoredDuringExecution", []).append(
        {"weight": 100, "preference": term}
    )


def _container(job: FineTuneJob, env: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    topology = job.spec.topology
    gpu = topology.accelerator is Accelerator.GPU
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": settings.trainer_image_gpu if gpu else settings.trainer_image_cpu,
        "command": list(settings.trainer_command),
        "env": env,
        "terminationMessagePath": layout.TERMINATION_LOG,
        # Where the supervisor itself was killed, the end of the log is better than nothing.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": build_resources(topology, settings.cores_per_rank),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [mount for _, mount in build_volumes(job, settings)],
    }
    if job.spec.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret.name}} for secret in job.spec.secrets]
    return container


def _pod_security(settings: Settings) -> dict[str, Any]:
    """What the restricted Pod Security Standard asks for, and volumes that this user may write to."""
    user = settings.trainer_user_id
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
