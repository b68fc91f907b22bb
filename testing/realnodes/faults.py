"""Faults that are injected during training, and the reasons that the ledger may record for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from testing.realnodes.cluster import RealCluster
from testing.realnodes.job import JobsHarness
from testing.realnodes.names import FAULT_TAINT, HOME, NAME, OURS, TEAM
from testing.realnodes.store import KubectlCluster

PRIORITY = "urgent"
KILL = """
for process in /proc/[0-9]*; do
    tr '\\0' '\\n' < "$process/environ" 2> /dev/null | grep -qx "HOSTNAME=$0" || continue
    tr '\\0' ' ' < "$process/cmdline" | grep -q finetune-supervisor && kill -KILL "${process#/proc/}" && exit 0
done
exit 1
"""


@dataclass(frozen=True)
class FaultTarget:
    """The running job that a fault is injected into, and its cluster."""

    cluster: KubectlCluster
    harness: JobsHarness
    job: str
    upgrade: Callable[[], None]

    @property
    def machines(self) -> RealCluster:
        """Return the cluster, whose node machines must be accessible."""
        assert isinstance(self.cluster, RealCluster)
        return self.cluster

    @property
    def pod(self) -> dict[str, Any]:
        """Return the pod of the second rank."""
        pods = self.harness.pods(self.job)
        return next(pod for pod in pods if pod["metadata"]["labels"]["finetune-operator.io/node-rank"] == "1")

    @property
    def pod_name(self) -> str:
        name: str = self.pod["metadata"]["name"]
        return name

    @property
    def node(self) -> str:
        name: str = self.pod["spec"]["nodeName"]
        return name

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self.cluster.kubectl(*arguments, stdin=stdin, timeout_seconds=120)


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    inject: Callable[[FaultTarget], Callable[[], None]]
    """Inject the fault; return the function that undoes it after the job has ended."""
    causes: frozenset[str]
    """Reasons that the ledger may record. Empty: no attempt may end."""
    needs_machines: bool = False
    """The fault needs access to the machines of the nodes, or must know their free resources."""
    on_script: bool = False
    """The job runs a script."""


def drain(target: FaultTarget) -> Callable[[], None]:
    node = target.node
    target.kubectl("label", "node", node, f"{OURS}=drained")
    target.kubectl("drain", node, "--force", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=90s")

    def undo() -> None:
        target.kubectl("uncordon", node)
        target.kubectl("label", "node", node, f"{OURS}-")

    return undo


def taint(target: FaultTarget) -> Callable[[], None]:
    node = target.node
    target.kubectl("taint", "node", node, f"{FAULT_TAINT}=true:NoExecute")
    return lambda: discard(target.kubectl("taint", "node", node, f"{FAULT_TAINT}-"))


def preempt_by_priority(target: FaultTarget) -> Callable[[], None]:
    node = target.node
    priority = {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": PRIORITY},
        "value": 1000,
    }
    container = {
        "name": "hog",
        "image": "localhost/pause:test",
        "imagePullPolicy": "Never",
        "resources": {"requests": {"cpu": "1200m"}},
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "urgent", "namespace": "default"},
        "spec": {
            "priorityClassName": PRIORITY,
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 0,
            "containers": [container],
        },
    }
    for thing in (priority, pod):
        target.kubectl("apply", "--server-side", "--filename=-", stdin=json.dumps(thing))
    return lambda: discard(target.kubectl("--namespace=default", "delete", "pod", "urgent", "--wait=false"))


def force_delete(target: FaultTarget) -> Callable[[], None]:
    target.kubectl("--namespace", TEAM, "delete", "pod", target.pod_name, "--grace-period=0", "--force")
    return do_nothing


def kill_container(target: FaultTarget) -> Callable[[], None]:
    node = next(node for node in target.machines.nodes if node.name == target.node)
    node.inside("bash", "-c", KILL, target.pod_name)
    return do_nothing


def kill_node(target: FaultTarget) -> Callable[[], None]:
    node = next(node for node in target.machines.nodes if node.name == target.node)
    node.kill()
    target.machines.wait_ready(node.name, ready=False)

    def undo() -> None:
        node.start()
        target.machines.wait_ready(node.name)

    return undo


def delete_operator(target: FaultTarget) -> Callable[[], None]:
    pods = json.loads(target.kubectl("--namespace", HOME, "get", "pods", "--output=json"))["items"]
    name = next(pod["metadata"]["name"] for pod in pods if pod["metadata"]["uid"] == target.harness.leader())
    target.kubectl("--namespace", HOME, "delete", "pod", name, "--wait=false")
    return do_nothing


def upgrade(target: FaultTarget) -> Callable[[], None]:
    target.upgrade()
    rolled_out = ("rollout", "status", f"deployment/{NAME}", "--timeout=100s")
    return lambda: discard(target.kubectl("--namespace", HOME, *rolled_out))


def discard(_: object) -> None:
    """Ignore the output of a command."""


def do_nothing() -> None:
    """Do nothing: the fault needs no undo."""


WITH_NOTICE = {"NoticeSaved", "Preempted"}
FAULTS: dict[str, Fault] = {
    "kubectl drain": Fault(drain, frozenset(WITH_NOTICE | {"EvictionByEvictionAPI"})),
    "termination taint": Fault(taint, frozenset(WITH_NOTICE | {"DeletionByTaintManager"})),
    "higher priority": Fault(
        preempt_by_priority, frozenset(WITH_NOTICE | {"PreemptionByScheduler"}), needs_machines=True
    ),
    "delete --grace-period=0": Fault(force_delete, frozenset({"PodDeleted", "PodLost"})),
    "SIGKILL of a container": Fault(kill_container, frozenset({"ProcessFailed", "OutOfMemory"}), needs_machines=True),
    "SIGKILL of a node": Fault(
        kill_node, frozenset({"NodeLost", "PodLost", "DeletionByTaintManager"}), needs_machines=True
    ),
    "script: kubectl drain": Fault(drain, frozenset(WITH_NOTICE | {"EvictionByEvictionAPI"}), on_script=True),
    "script: SIGKILL of a container": Fault(
        kill_container, frozenset({"ProcessFailed", "OutOfMemory"}), needs_machines=True, on_script=True
    ),
    "operator's pod deleted": Fault(delete_operator, frozenset()),
    "helm upgrade": Fault(upgrade, frozenset()),
}
"""The faults by the names shown in the table."""
SHORT = ("kubectl drain", "SIGKILL of a node", "operator's pod deleted")
"""One fault of each kind: with a preemption notice, without one, and of the operator."""
