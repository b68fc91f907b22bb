"""Nodes that kwok plays: their manifests, their coming and going.

Called by `server`. What pods on them do is in `stages/`: they run at once, and end when they are deleted; annotations
of a pod (HOLD and so on) change that, and a status that a test writes stays as it is.
"""

from __future__ import annotations

import datetime
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from testing.controlplane.api import Api
from testing.controlplane.process import wait_for

# kwok looks after the nodes with this label.
MANAGED_LABEL = "testbed/managed"

# Annotations of a pod, see stages/pod.yaml.
HOLD = "testbed/hold"
START_SECONDS = "testbed/start-seconds"
STOP_SECONDS = "testbed/stop-seconds"
EXIT_CODE = "testbed/exit-code"

PODS_PER_NODE = 1000
NODES_PATH = "/api/v1/nodes"


def build_node(
    name: str,
    *,
    cpu: str,
    memory: str,
    gpus: int,
    labels: Mapping[str, str],
    taints: Iterable[Mapping[str, str]],
) -> dict[str, Any]:
    """Manifest of a node. Its address is the loopback: whoever asks it for logs is refused there."""
    resources = {"cpu": cpu, "memory": memory, "ephemeral-storage": "1Ti", "pods": str(PODS_PER_NODE)}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    own_labels = {
        MANAGED_LABEL: "true",
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {**own_labels, **labels}},
        "spec": {"taints": [dict(taint) for taint in taints]},
        "status": {
            "capacity": resources,
            "allocatable": resources,
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": name}],
            "nodeInfo": {
                "architecture": "amd64",
                "bootID": name,
                "containerRuntimeVersion": "kwok",
                "kernelVersion": "kwok",
                "kubeProxyVersion": "",
                "kubeletVersion": "kwok",
                "machineID": name,
                "operatingSystem": "linux",
                "osImage": "kwok",
                "systemUUID": name,
            },
        },
    }


def build_unknown_status(now: datetime.datetime) -> dict[str, Any]:
    """Status patch that the node controller writes for a node that it has not heard from for a while."""
    time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    condition = {
        "type": "Ready",
        "status": "Unknown",
        "reason": "NodeStatusUnknown",
        "message": "Kubelet stopped posting node status.",
        "lastTransitionTime": time,
    }
    return {"status": {"conditions": [condition]}}


def is_usable(node: Mapping[str, Any]) -> bool:
    """Whether a node is ready and no longer has the taint that it was born with."""
    conditions = node["status"].get("conditions", [])
    ready = any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
    taints = node["spec"].get("taints", [])
    return ready and not any(taint["key"].startswith("node.kubernetes.io/") for taint in taints)


def wait_until_usable(api: Api, names: Iterable[str], seconds: float) -> None:
    """Wait until pods can be scheduled to all these nodes."""
    wanted = set(names)
    selector = urllib.parse.quote(f"{MANAGED_LABEL}=true")

    def all_usable() -> bool:
        nodes = api.get(f"{NODES_PATH}?labelSelector={selector}&resourceVersion=0")["items"]
        return wanted <= {node["metadata"]["name"] for node in nodes if is_usable(node)}

    wait_for(f"{len(wanted)} kwok nodes are ready", all_usable, seconds)


def neglect(api: Api, name: str) -> None:
    """A node whose kubelet stands still: nobody looks after its pods, and the cluster does not know it yet."""
    api.patch(f"{NODES_PATH}/{name}", {"metadata": {"labels": {MANAGED_LABEL: None}}})


def lose(api: Api, name: str, now: datetime.datetime) -> None:
    """A node whose machine vanished: nobody looks after its pods.

    The node controller would see that after its grace period; here it is told at once, and goes on from there: taint,
    eviction. At least one node of the cluster has to stay, or the controller takes itself for cut off.
    """
    neglect(api, name)
    api.patch(f"{NODES_PATH}/{name}/status", build_unknown_status(now), "strategic")


def recover(api: Api, name: str) -> None:
    """A lost or neglected node is back: kwok looks after it and its pods again."""
    api.patch(f"{NODES_PATH}/{name}", {"metadata": {"labels": {MANAGED_LABEL: "true"}}})
