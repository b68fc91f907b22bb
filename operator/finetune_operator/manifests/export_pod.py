"""Builds the pod that writes outputs from a checkpoint, outside of the gang: with other packages, or at any time."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from finetune_contract.outputs.environments import needs_export_image
from finetune_contract.outputs.request import ExportRequest
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.labels import EXPORT, TEMPLATE
from finetune_operator.api.names import CONTAINER, export_pod_name
from finetune_operator.api.status import Capacity
from finetune_operator.manifests.env import build_export_env
from finetune_operator.manifests.metadata import build_metadata, job_labels
from finetune_operator.manifests.placement import HOST, build_placement, siblings
from finetune_operator.manifests.pods import (
    add_volumes,
    apply_template,
    build_container,
    pod_security,
    select_image,
    uses_user_namespace,
)
from finetune_operator.manifests.template import hash_template
from finetune_operator.manifests.volumes import build_volumes
from finetune_operator.settings import Settings

HASH_CHARACTERS = 10
GRACE_SECONDS = 30
"""Grace period of the pod. A kill at any point is safe: the next pod completes what is missing."""
OF_A_CPU_POD = ("cpu", "memory", "ephemeral-storage")
"""Resources of a training pod that the export needs, too: it runs on the CPU, with one process."""


def hash_request(request: ExportRequest) -> str:
    """Return a hash of a request."""
    return hashlib.sha256(request.to_json().encode()).hexdigest()[:HASH_CHARACTERS]


def build_export_pod(job: FineTuneJob, request: ExportRequest, settings: Settings) -> dict[str, Any]:
    """Return the export pod of a request, merged with `spec.podTemplate`.

    It has the volumes, Secrets and node constraints of a training pod, so it reaches the same targets.

    Raises:
        MergeError: the template cannot be merged.
    """
    one = _of_one_process(job, request)
    labels = job_labels(job.metadata.name) | {EXPORT: hash_request(request), TEMPLATE: hash_template(job.spec)}
    identity: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": build_metadata(job, export_pod_name(job.metadata.name), labels),
        "spec": {"restartPolicy": "Never"},
    }
    # Without the coordinator's URL, no token is mounted: the pod sends no heartbeats.
    silent = replace(settings, coordinator_url="")
    container = build_container(one, build_export_env(one, request, silent), silent)
    container["image"] = select_export_image(one, request, settings)
    container["command"] = list(settings.export_command)
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": pod_security(settings),
        "containers": [container],
        **build_placement(one, settings, Capacity.ANY if job.spec.recovery.spot is not None else None),
    }
    if uses_claim(job, settings):
        _prefer_node_of_gang(spec, job)
    if uses_user_namespace(job, settings):
        spec["hostUsers"] = False
    if job.spec.priority_class_name:
        spec["priorityClassName"] = job.spec.priority_class_name
    add_volumes(spec, build_volumes(one, silent))
    pod = apply_template({**identity, "spec": spec | identity["spec"]}, identity, job.spec.pod_template)
    _restore(pod, container, needs_image=any(map(needs_export_image, request.outputs)))
    return pod


def uses_claim(job: FineTuneJob, settings: Settings) -> bool:
    """Return whether pods of a job mount a claim. A ReadWriteOnce claim is attached to one node at a time."""
    template = (job.spec.pod_template or {}).get("spec")
    extra = template.get("volumes") if isinstance(template, dict) else None
    sources = [volume for volume, _ in build_volumes(job, settings)]
    sources += [each for each in extra if isinstance(each, dict)] if isinstance(extra, list) else []
    return any("persistentVolumeClaim" in each for each in sources)


def _prefer_node_of_gang(spec: dict[str, Any], job: FineTuneJob) -> None:
    """Prefer a node on which pods of the job run: their claims are attached there.

    It is no requirement: a claim may allow several nodes, and the nodes of the gang may be full.
    """
    term = {"labelSelector": siblings(job), "topologyKey": HOST}
    near = spec.setdefault("affinity", {}).setdefault("podAffinity", {})
    near.setdefault("preferredDuringSchedulingIgnoredDuringExecution", []).append(
        {"weight": 100, "podAffinityTerm": term}
    )


def select_export_image(job: FineTuneJob, request: ExportRequest, settings: Settings) -> str:
    """Return the image of an export: that of the export packages if an output needs them."""
    if any(map(needs_export_image, request.outputs)):
        return settings.trainer_image_export
    return settings.trainer_image_cpu if job.spec.training.script is None else select_image(job.spec.topology, settings)


def _of_one_process(job: FineTuneJob, request: ExportRequest) -> FineTuneJob:
    """Return the job as its export pod sees it: one process, the outputs of the request, no scratch disk."""
    spec = job.spec
    kept = {name: amount for name, amount in (spec.topology.resources or {}).items() if name in OF_A_CPU_POD}
    topology = spec.topology.model_copy(
        update={"nodes": 1, "min_nodes": None, "max_nodes": None, "processes_per_node": 1, "resources": kept or None}
    )
    checkpoint = spec.checkpoint.model_copy(update={"scratch": None})
    changes = {"topology": topology, "checkpoint": checkpoint, "outputs": request.outputs}
    return job.model_copy(update={"spec": spec.model_copy(update=changes)})


def _restore(pod: dict[str, Any], own: dict[str, Any], *, needs_image: bool) -> None:
    """Undo what a podTemplate for training pods changes in the container and an export pod cannot have."""
    (container,) = (each for each in pod["spec"]["containers"] if each.get("name") == CONTAINER)
    container["command"] = own["command"]
    container.pop("args", None)
    if needs_image:
        container["image"] = own["image"]
    resources = {
        kind: {name: amount for name, amount in (amounts or {}).items() if name in OF_A_CPU_POD}
        for kind, amounts in (container.get("resources") or {}).items()
        if kind in ("requests", "limits")
    }
    container["resources"] = {kind: amounts for kind, amounts in resources.items() if amounts}
