"""Builds the Workload with which a job requests the admission of its pods by a queue of Kueue. Pure.

The pod set is one of the pods that the job would create. A Workload contains the hash of its request, so that an edit
of the job is detected without a comparison of pod templates.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from finetune_operator.api import kueue, labels
from finetune_operator.api.job import FineTuneJob
from finetune_operator.manifests.metadata import build_metadata, job_labels
from finetune_operator.manifests.placement import pack_label
from finetune_operator.manifests.pods import build_pod
from finetune_operator.manifests.resources import grown_topology
from finetune_operator.manifests.run_spec import num_nodes
from finetune_operator.settings import Settings

HASH_CHARACTERS = 10
REQUIRED, PREFERRED = f"{kueue.GROUP}/podset-required-topology", f"{kueue.GROUP}/podset-preferred-topology"
UNCONSTRAINED = f"{kueue.GROUP}/podset-unconstrained-topology"
FOR_SCHEDULING = (
    *("nodeSelector", "affinity", "tolerations", "topologySpreadConstraints", "runtimeClassName"),
    "resourceClaims",
)
OF_A_CONTAINER = ("name", "image", "resources", "ports", "restartPolicy")
"""Fields of a pod and its containers that quota and placement depend on; the others would only make it larger."""


def build_workload(job: FineTuneJob, settings: Settings, *, replaces: str | None = None) -> dict[str, Any]:
    """Return the Workload of a job. Its `priority` is added by the cluster, which can read priority classes.

    Args:
        job: the job that owns it.
        settings: the administrator's settings.
        replaces: name of the admitted Workload for fewer pods that it replaces; None: it is the job's first.
    """
    size, least = num_nodes(job.spec), job.spec.topology.min_nodes
    pod_set: dict[str, Any] = {"name": kueue.POD_SET, "count": size, "template": build_pod_template(job, settings)}
    request = _topology_request(pod_set["template"]["metadata"].get("annotations") or {})
    if request := request or _pack_request(job, settings):
        pod_set["topologyRequest"] = request
    annotations: dict[str, str] = {}
    if replaces is not None:
        # Kueue accepts either partial admission or a replacement.
        annotations = {kueue.ELASTIC: "true", kueue.REPLACES: f"{job.metadata.namespace}/{replaces}"}
    elif least is not None and least < size:
        pod_set["minCount"] = least
    spec: dict[str, Any] = {"queueName": kueue.queue_of(job), "podSets": [pod_set], "active": True}
    if seconds := job.metadata.labels.get(kueue.MAX_SECONDS_LABEL):
        spec["maximumExecutionTimeSeconds"] = int(seconds) if seconds.isdecimal() else seconds
    name = workload_name(job, size if replaces is not None else None)
    metadata = build_metadata(job, name, job_labels(job.metadata.name) | {kueue.JOB_UID_LABEL: job.metadata.uid})
    metadata["annotations"] = annotations | {labels.REQUEST: hash_request(job)}
    return {"apiVersion": kueue.API_VERSION, "kind": kueue.WORKLOAD, "metadata": metadata, "spec": spec}


def workload_name(job: FineTuneJob, size: int | None = None) -> str:
    """Return the name of a job's Workload. A replacement has the number of its pods in its name.

    The UID is part of the name: Kueue keeps Workloads of a deleted job for a while.
    """
    name = f"{job.metadata.name}-{job.metadata.uid[:8]}"
    return name if size is None else f"{name}-{size}"


def build_pod_template(job: FineTuneJob, settings: Settings) -> dict[str, Any]:
    """Return the part of a pod that quota and placement depend on."""
    pod = build_pod(job, 1, 0, settings)
    spec = {name: pod["spec"][name] for name in FOR_SCHEDULING if name in pod["spec"]}
    spec["restartPolicy"] = "Never"
    for name in ("containers", "initContainers"):
        if pod["spec"].get(name):
            spec[name] = [_container(container) for container in pod["spec"][name]]
    if pod["spec"].get("priorityClassName"):
        spec["priorityClassName"] = pod["spec"]["priorityClassName"]
    if pod["spec"].get("overhead"):
        spec["overhead"] = pod["spec"]["overhead"]
    metadata = {name: pod["metadata"][name] for name in ("annotations",) if name in pod["metadata"]}
    return {"metadata": metadata | {"labels": job_labels(job.metadata.name)}, "spec": spec}


def hash_request(job: FineTuneJob) -> str:
    """Return the hash of everything in the request that an edit of the job may change.

    It depends on the job only: an upgrade of the operator must not put running jobs into the queue again.
    """
    spec = job.spec
    of_topology = {"pack": spec.topology.pack, "claim": spec.topology.gpu_claim_template_name}
    parts = [
        kueue.queue_of(job),
        [job.metadata.labels.get(name) for name in (kueue.PRIORITY_CLASS_LABEL, kueue.MAX_SECONDS_LABEL)],
        [num_nodes(spec), spec.topology.min_nodes],
        grown_topology(job).resources,
        spec.recovery.spot is not None,
        spec.priority_class_name,
        spec.pod_template,
        *({name: value} for name, value in of_topology.items() if value is not None),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:HASH_CHARACTERS]


def _container(container: dict[str, Any]) -> dict[str, Any]:
    return {name: container[name] for name in OF_A_CONTAINER if name in container}


def _pack_request(job: FineTuneJob, settings: Settings) -> dict[str, Any]:
    """Return the request of a packed job; empty: it is not packed, or the flavors of its queue have no topology.

    Kueue never admits a request for a domain if no flavor has a topology.
    """
    label = pack_label(job.spec, settings) if settings.kueue_topology else None
    return {"required": label, "podIndexLabel": labels.NODE_RANK} if label else {}


def _topology_request(annotations: dict[str, str]) -> dict[str, Any]:
    """Return the request of pods that podTemplate gives Kueue's annotations for topologies; empty: there are none."""
    request: dict[str, Any] = {}
    if REQUIRED in annotations:
        request["required"] = annotations[REQUIRED]
    if PREFERRED in annotations:
        request["preferred"] = annotations[PREFERRED]
    if annotations.get(UNCONSTRAINED) == "true":
        request["unconstrained"] = True
    return request | {"podIndexLabel": labels.NODE_RANK} if request else {}
