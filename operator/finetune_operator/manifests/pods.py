"""Builds the manifest of one pod of a gang, for a Kubernetes API server and for the local cluster alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_contract.cpu.spec import CpuBackend
from finetune_contract.spec import SwitchMode
from finetune_operator.api.evictions import PRIORITY, RESPONDER
from finetune_operator.api.job import Accelerator, FineTuneJob, TopologySpec
from finetune_operator.api.labels import CAPACITY, TEMPLATE
from finetune_operator.api.names import CONTAINER, pod_name, service_name
from finetune_operator.api.status import Capacity
from finetune_operator.manifests import layout
from finetune_operator.manifests.admission import Admission, admit
from finetune_operator.manifests.env import PodSlot, build_env
from finetune_operator.manifests.gang import GangMembership, join_gang
from finetune_operator.manifests.merge import MergeError, merge
from finetune_operator.manifests.metadata import build_metadata, pod_labels
from finetune_operator.manifests.placement import build_placement
from finetune_operator.manifests.resources import build_claims, build_resources, grown_topology
from finetune_operator.manifests.run_spec import num_nodes
from finetune_operator.manifests.template import hash_template
from finetune_operator.manifests.volumes import Volume, build_volumes
from finetune_operator.settings import Settings

TEMPLATE_FIELDS = ("metadata", "spec")


@dataclass(frozen=True)
class PodOptions:
    """Properties of a pod that depend on its gang, not only on its attempt and node rank."""

    num_nodes: int | None = None
    """Number of pods in its gang; None: the number that the spec requests."""
    first_pod: tuple[int, int] | None = None
    """Attempt and node rank in the name of node rank 0's pod, if that pod was kept; None: a pod of this attempt."""
    capacity: Capacity | None = None
    """Kind of nodes that the pod requests; None: as the spec specifies."""
    mtbf_seconds: float | None = None
    """Observed mean time between the job's interruptions."""
    checks_devices: bool = False
    """Whether its ranks check their devices before they train, because a GPU failed in the attempt before."""
    is_standby: bool = False
    """Whether it is a standby pod: it starts no ranks until it is assigned to a gang."""
    avoid: tuple[str, ...] = ()
    """Names of nodes to use only if no others are available."""
    admission: Admission | None = None
    """What the queue adds to its pods; None: nothing, or the job has no queue."""
    names_responder: bool = False
    """Whether it names the operator as a responder of its eviction requests. Pods of a PodGroup cannot."""
    has_names: bool = False
    """Whether the ranks meet by the name of rank 0's pod: the job has a service."""
    gang: GangMembership | None = None
    """How it receives its node together with other pods; None: by itself."""


DEFAULT_OPTIONS = PodOptions()


def build_pod(
    job: FineTuneJob, attempt: int, node_rank: int, settings: Settings, options: PodOptions = DEFAULT_OPTIONS
) -> dict[str, Any]:
    """Return the pod of one node rank (from 0) in one attempt (from 1), merged with `spec.podTemplate`.

    Raises:
        MergeError: the template cannot be merged, or removes the trainer.
    """
    identity = _identity(job, attempt, node_rank)
    if options.capacity is not None:
        identity["metadata"]["labels"][CAPACITY] = options.capacity.value
    size = options.num_nodes or num_nodes(job.spec)
    slot = PodSlot(
        attempt,
        node_rank,
        size,
        options.first_pod or (attempt, 0),
        is_standby=options.is_standby,
        mtbf_seconds=options.mtbf_seconds,
        checks_devices=options.checks_devices,
        has_names=options.has_names,
    )
    spec = _pod_spec(job, build_env(job, slot, settings), settings, options.capacity)
    add_volumes(spec, build_volumes(job, settings, node_rank))
    _avoid(spec, options.avoid)
    if options.names_responder:
        spec["evictionResponders"] = [{"name": RESPONDER, "priority": PRIORITY}]
    pod = {**identity, "spec": spec | identity["spec"]}
    pod = apply_template(pod, identity, job.spec.pod_template)
    pod = pod if options.admission is None else admit(pod, options.admission)
    return pod if options.gang is None else join_gang(pod, options.gang)


def apply_template(pod: dict[str, Any], identity: dict[str, Any], template: dict[str, Any] | None) -> dict[str, Any]:
    """Return a pod merged with a podTemplate; the identity is kept.

    Raises:
        MergeError: the template cannot be merged, or removes the trainer.
    """
    if not template:
        return pod
    # The template is merged over the pod, then the identity over the result: the plan must find the pod even if the
    # template sets a name or labels.
    pod = merge(merge(pod, _check_template(template)), identity)
    if not _has_trainer(pod):
        raise MergeError(
            f"it removes the container {CONTAINER}; keep the container and write only the fields to change"
        )
    return pod


def _check_template(template: dict[str, Any]) -> dict[str, Any]:
    """Check the fields of a PodTemplateSpec; the API server would silently drop unknown ones."""
    for name in template:
        if name not in TEMPLATE_FIELDS:
            raise MergeError(f"{name} is not a field of a PodTemplateSpec; write it below spec or metadata")
    return template


def _has_trainer(pod: dict[str, Any]) -> bool:
    """Return whether the trainer's container exists; a template may have replaced it by a value of any form."""
    containers = pod["spec"].get("containers")
    if not isinstance(containers, list):
        return False
    return any(isinstance(container, dict) and container.get("name") == CONTAINER for container in containers)


def _identity(job: FineTuneJob, attempt: int, node_rank: int) -> dict[str, Any]:
    name = pod_name(job.metadata.name, attempt, node_rank)
    labels = pod_labels(job.metadata.name, attempt, node_rank) | {TEMPLATE: hash_template(job.spec)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": build_metadata(job, name, labels),
        "spec": {
            "hostname": name,
            # It has no effect until the job needs a service.
            "subdomain": service_name(job.metadata.name),
            # The end of a pod ends its attempt; the next attempt has new pods.
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
        "securityContext": pod_security(settings),
        "containers": [build_container(job, env, settings)],
        **build_placement(job, settings, capacity),
    }
    if uses_user_namespace(job, settings):
        spec["hostUsers"] = False
    if claims := build_claims(job.spec.topology):
        spec["resourceClaims"] = claims
    if job.spec.priority_class_name:
        spec["priorityClassName"] = job.spec.priority_class_name
    return spec


def add_volumes(spec: dict[str, Any], volumes: Sequence[tuple[Volume, dict[str, Any]]]) -> None:
    """Add volumes to a pod, and their mounts to the trainer."""
    spec["volumes"] = [volume for volume, _ in volumes]
    spec["containers"][0]["volumeMounts"] = [mount for _, mount in volumes]


def _avoid(spec: dict[str, Any], nodes: Sequence[str]) -> None:
    """Add a preference against nodes, not a requirement: a job that fits on no other node must not wait forever."""
    if not nodes:
        return
    term = {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": list(nodes)}]}
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    affinity.setdefault("preferredDuringSchedulingIgnoredDuringExecution", []).append(
        {"weight": 100, "preference": term}
    )


def build_container(job: FineTuneJob, env: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Return the container of the trainer."""
    topology = job.spec.topology
    script = job.spec.training.script
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": (script.image if script else None) or select_image(topology, settings),
        "command": list(settings.trainer_command),
        "env": env,
        "terminationMessagePath": layout.TERMINATION_LOG,
        # If the supervisor itself was killed, the end of the log replaces its termination message.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": build_resources(grown_topology(job), settings.cores_per_rank),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    if job.spec.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret.name}} for secret in job.spec.secrets]
    return container


def select_image(topology: TopologySpec, settings: Settings) -> str:
    """Return the image for a topology: what the job requests must be installed in it."""
    if topology.accelerator is Accelerator.GPU:
        return settings.trainer_image_gpu
    if topology.cpu.backend is CpuBackend.CCL or topology.cpu.ipex is SwitchMode.ON:
        return settings.trainer_image_cpu_intel
    return settings.trainer_image_cpu


def uses_user_namespace(job: FineTuneJob, settings: Settings) -> bool:
    """Return whether the pods of a job have a user namespace of their own. The kernel maps no owners of NFS."""
    storage = job.spec.checkpoint.storage
    return settings.user_namespaces and (storage is None or storage.nfs is None)


def pod_security(settings: Settings) -> dict[str, Any]:
    """Return the settings of the restricted Pod Security Standard; the trainer's user can write to the volumes."""
    user = settings.trainer_user_id
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
