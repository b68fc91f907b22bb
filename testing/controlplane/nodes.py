"""Nodes that kwok simulates: their manifests, and faults of nodes.

Called by `server`. `stages/` defines how their pods behave: they run at once, and end when they are deleted.
Annotations of a pod (HOLD and so on) change that, and a status that a test writes is kept.
"""

from __future__ import annotations

import datetime
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from testing.controlplane.api import Api
from testing.controlplane.process import wait_for

# kwok manages the nodes with this label.
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
    """Return the manifest of a node. Its address is the loopback interface, so requests for logs are refused."""
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
    """Return the status patch that the node controller writes for a node that stopped reporting."""
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
    """Return whether a node is ready and no longer has its initial taint."""
    conditions = node["status"].get("conditions", [])
    ready = any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
    taints = node["spec"].get("taints", [])
    return ready and not any(taint["key"].startswith("node.kubernetes.io/") for taint in taints)


def wait_until_usable(api: Api, names: Iterable[str], seconds: float) -> None:
    """Wait until pods can be scheduled to all nodes."""
    wanted = set(names)
    selector = urllib.parse.quote(f"{MANAGED_LABEL}=true")

    def all_usable() -> bool:
        nodes = api.get(f"{NODES_PATH}?labelSelector={selector}&resourceVersion=0")["items"]
        return wanted <= {node["metadata"]["name"] for node in nodes if is_usable(node)}

    wait_for(f"{len(wanted)} kwok nodes are ready", all_usable, seconds)


def hang_kubelet(api: Api, name: str) -> None:
    """Make a node's kubelet hang: its pods are no longer managed, and the cluster has not detected it yet."""
    api.patch(f"{NODES_PATH}/{name}", {"metadata": {"labels": {MANAGED_LABEL: None}}})


def lose(api: Api, name: str, now: datetime.datetime) -> None:
    """Simulate the loss of a node: its pods are no longer managed, and its status is unknown.

    The node controller would detect this after its grace period; here the status is set at once, and the controller
    continues with the taint and the eviction. At least one node must stay ready, otherwise the controller assumes that
    it is disconnected itself and evicts nothing.
    """
    hang_kubelet(api, name)
    api.patch(f"{NODES_PATH}/{name}/status", build_unknown_status(now), "strategic")


def recover(api: Api, name: str) -> None:
    """Recover a lost node or a hanging kubelet: kwok manages the node and its pods again."""
    api.patch(f"{NODES_PATH}/{name}", {"metadata": {"labels": {MANAGED_LABEL: "true"}}})
