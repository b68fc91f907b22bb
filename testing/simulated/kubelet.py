"""Scheduler, kubelets and node controller of the simulation: they run pods on nodes that come and go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from finetune_contract.heartbeat import Termination
from finetune_operator.plan.model.types import ObservedExport, PodPhase
from testing.simulated.engine import Engine
from testing.simulated.model import SimulatedNode, SimulatedPod
from testing.simulated.server import SimulatedApiServer

NO_ROOM = "Unschedulable: no node has room"
SILENT_SECONDS = 40.0
"""Time without status from its kubelet after which a node's Ready condition becomes Unknown."""
TOLERATION_SECONDS = 300.0
"""Further time after which the pods of a lost node are deleted. No kubelet carries that out."""
SHUTDOWN = "TerminationByKubelet"


class Kubelets:
    """All kubelets, and the scheduler. They call `start` for every pod whose container starts."""

    def __init__(self, engine: Engine, server: SimulatedApiServer, start: Callable[[SimulatedPod], None]) -> None:
        self.pull_seconds = 5.0
        """Mean time from scheduling to a running container."""
        self.cached_seconds: float | None = None
        """Mean time on a node that has the image; None: `pull_seconds`."""
        self._engine = engine
        self._server = server
        self._start = start
        self._waiting: list[SimulatedPod] = []
        self._num_nodes = 0
        server.pod_changed = self._pod_changed
        server.gate_opened = self.schedule

    # -- pods ---------------------------------------------------------------------------------------------------------

    def _pod_changed(self, pod: SimulatedPod) -> None:
        if self._server.pods.get(pod.observed.name) is not pod:
            self.schedule()
        elif pod.node is None:
            self._waiting.append(pod)
            self.schedule()
        elif pod.node.connected:
            self._terminate(pod)

    def schedule(self) -> None:
        """Bind waiting pods to free nodes, in the order of their creation."""
        unbound = []
        for pod in self._waiting:
            if self._server.pods.get(pod.observed.name) is not pod:
                continue
            if pod.observed.gated:
                unbound.append(pod)
                continue
            node = self._room_for(pod) if self._fits(pod.group) else None
            if node is None:
                unbound.append(pod)
                if pod.observed.waiting != NO_ROOM:
                    self._server.change(pod, waiting=NO_ROOM)
                continue
            node.pods.add(pod.observed.name)
            pod.node = node
            now = self._engine.now()
            self._server.change(pod, node=node.name, scheduled_at=now, waiting="ContainerCreating")
            mean = self.cached_seconds if node.has_image and self.cached_seconds is not None else self.pull_seconds
            node.has_image = True
            self._engine.after(self._engine.rng.expovariate(1 / mean), lambda pod=pod: self._run(pod))  # type: ignore[misc]
        self._waiting = unbound

    def _fits(self, group: str) -> bool:
        """Return whether enough pods of a PodGroup have a node or can have one now; True for pods without a group."""
        if not group:
            return True
        pods = [pod for pod in self._server.pods.values() if pod.group == group]
        num_bound = sum(pod.node is not None for pod in pods)
        waiting = sorted((pod for pod in pods if pod.node is None), key=lambda pod: not pod.spot_only)
        free = [node for node in self._server.nodes.values() if _has_room(node)]
        for pod in waiting:
            node = next((node for node in free if node.spot), None if pod.spot_only else next(iter(free), None))
            if node is not None:
                free.remove(node)
                num_bound += 1
        # Without its PodGroup, a pod waits.
        return group in self._server.group_sizes and num_bound >= self._server.group_sizes[group]

    def _room_for(self, pod: SimulatedPod) -> SimulatedNode | None:
        """Return a free node for a pod: not one that it avoids, then spot nodes first, as all pods prefer them."""
        free = [node for node in self._server.nodes.values() if _has_room(node) and (node.spot or not pod.spot_only)]
        free = [node for node in free if node.name not in pod.avoid] or free
        return next((node for node in free if node.spot), free[0] if free else None)

    def _run(self, pod: SimulatedPod) -> None:
        node = pod.node
        exists = self._server.pods.get(pod.observed.name) is pod and pod.observed.deleted_at is None
        if node is None or not exists or not node.up or pod.observed.phase is not PodPhase.PENDING:
            return
        if not node.connected:
            # Its kubelet does not receive the pod yet.
            self._engine.after(5.0, lambda: self._run(pod))
            return
        if node.refuses:
            self._refuse(pod, node)
            return
        pod.running = True
        # Drop the pods that have ended.
        node.started = [*(other for other in node.started if other.running), pod]
        self._server.change(pod, phase=PodPhase.RUNNING, ready=True, waiting=None, address=node.name)
        self._start(pod)

    def fail_start(self, pod: SimulatedPod) -> None:
        """End a pod whose init container failed."""
        self._server.change(pod, phase=PodPhase.FAILED, init_failure="init container setup: exit code 1", waiting=None)
        if pod.node is not None:
            pod.node.pods.discard(pod.observed.name)
        self.schedule()

    def _refuse(self, pod: SimulatedPod, node: SimulatedNode) -> None:
        """End a pod that was never admitted."""
        message = "Pod was rejected: no healthy devices present"
        self._server.change(
            pod, phase=PodPhase.FAILED, reason="UnexpectedAdmissionError", message=message, waiting=None
        )
        node.pods.discard(pod.observed.name)
        self.schedule()

    def _terminate(self, pod: SimulatedPod) -> None:
        """Send SIGTERM now, and SIGKILL when the grace period is over."""
        if pod.running:
            left = pod.observed.grace.total_seconds()
            self._engine.after(left, lambda: self._kill(pod))
            pod.notice()
        elif pod.observed.phase is PodPhase.PENDING:
            self._engine.after(0.1, lambda: self._server.remove(pod))

    def _kill(self, pod: SimulatedPod) -> None:
        if pod.running and pod.node is not None and pod.node.connected and pod.observed.deleted_at is not None:
            over_at = pod.observed.deleted_at + pod.observed.grace
            if self._engine.now() >= over_at:
                pod.end(137)

    def ended(self, pod: SimulatedPod, code: int, termination: Termination | None, reason: str | None = None) -> None:
        """Handle the end of a pod's processes; the API server learns of it once the node is connected."""
        if not pod.running:
            return
        pod.running = False
        delay = self._engine.rng.uniform(0.05, 1.0)
        self._engine.after(delay, lambda: self._report_end(pod, code, termination, reason))

    def _report_end(self, pod: SimulatedPod, code: int, termination: Termination | None, reason: str | None) -> None:
        node = pod.node
        if node is None or not node.up or self._server.pods.get(pod.observed.name) is not pod:
            return
        if not node.connected:
            self._engine.after(5.0, lambda: self._report_end(pod, code, termination, reason))
            return
        self._server.change(
            pod,
            phase=PodPhase.SUCCEEDED if code == 0 else PodPhase.FAILED,
            ready=False,
            exit_code=code,
            finished_at=self._engine.now(node.skew_seconds),
            termination=termination,
            reason=pod.observed.reason or reason,
            export=_with_result(pod),
        )
        node.pods.discard(pod.observed.name)
        if pod.observed.deleted_at is not None:
            self._engine.after(0.1, lambda: self._server.remove(pod))
        self.schedule()

    # -- nodes --------------------------------------------------------------------------------------------------------

    def add_node(self, *, spot: bool = True, skew_seconds: float = 0.0) -> SimulatedNode:
        """Add a node, with a name that no node had before."""
        self._num_nodes += 1
        node = SimulatedNode(f"node-{self._num_nodes}", spot=spot, skew_seconds=skew_seconds)
        self._server.nodes[node.name] = node
        self.schedule()
        return node

    def preempt(self, node: SimulatedNode, notice_seconds: float, *, tainted: bool) -> None:
        """Announce a node's preemption by a taint or by ending its pods; remove it when the notice expires."""
        if not node.up or node.leaving:
            return
        node.leaving = "aws-node-termination-handler/spot-itn"
        if tainted:
            self._server.node_changed(node)
        else:
            for pod in self._pods_of(node):
                if node.connected:
                    self._server.evict(pod, SHUTDOWN)
        self._engine.after(notice_seconds, lambda: self.remove_node(node))

    def remove_node(self, node: SimulatedNode) -> None:
        """Remove a machine and its Node; the garbage collector deletes its pods later."""
        self._power_off(node)
        node.connected = False
        node.exists = False
        node.lost = True
        if self._server.nodes.pop(node.name, None) is None:
            return
        self._server.node_changed(node)
        self._engine.after(self._engine.rng.uniform(1.0, 60.0), lambda: self._collect(node))

    def stop_node(self, node: SimulatedNode, *, loud: bool) -> None:
        """Stop a machine; its Node is removed later. Peers notice closed connections (loud), or only silence."""
        self._power_off(node, loud=loud)
        node.connected = False
        self._engine.after(SILENT_SECONDS, lambda: self._lose(node))
        self._engine.after(self._engine.rng.uniform(60.0, 900.0), lambda: self.remove_node(node))

    def disconnect(self, node: SimulatedNode, seconds: float) -> None:
        """Disconnect a node from the control plane for a while; its processes keep running."""
        if node.up and node.connected:
            node.connected = False
            self._engine.after(SILENT_SECONDS, lambda: self._lose(node))
            self._engine.after(seconds, lambda: self._reconnect(node))

    def _lose(self, node: SimulatedNode) -> None:
        if node.connected or not node.exists or node.lost:
            return
        node.lost = True
        self._server.node_changed(node)
        self._engine.after(TOLERATION_SECONDS, lambda: self._evict_all(node))

    def _evict_all(self, node: SimulatedNode) -> None:
        if node.lost and node.exists:
            for pod in self._pods_of(node):
                self._server.evict(pod, "DeletionByTaintManager")

    def _reconnect(self, node: SimulatedNode) -> None:
        if not node.up or not node.exists:
            return
        node.connected = True
        if node.lost:
            node.lost = False
            self._server.node_changed(node)
        for pod in list(self._server.pods.values()):
            if pod.node is node and pod.observed.deleted_at is not None:
                # The kubelet receives the deletion now, so the grace period begins now.
                self._server.change(pod, deleted_at=self._engine.now())
                self._terminate(pod)
        for pod in list(self._orphans(node)):
            pod.end(137)
        self.schedule()

    def _orphans(self, node: SimulatedNode) -> list[SimulatedPod]:
        """Return running pods that the API server no longer has: their deletion was forced."""
        return [pod for pod in node.started if pod.running and self._server.pods.get(pod.observed.name) is not pod]

    def _power_off(self, node: SimulatedNode, *, loud: bool = False) -> None:
        if node.up:
            node.up = False
            for pod in node.started:
                if pod.running:
                    pod.running = False
                    pod.end(-2 if loud else -1)

    def _collect(self, node: SimulatedNode) -> None:
        for pod in self._pods_of(node):
            if pod.observed.phase not in (PodPhase.SUCCEEDED, PodPhase.FAILED) and pod.observed.disruption is None:
                self._server.change(pod, disruption="DeletionByPodGC")
            self._server.remove(pod)

    def _pods_of(self, node: SimulatedNode) -> list[SimulatedPod]:
        return [pod for pod in self._server.pods.values() if pod.node is node]


def _has_room(node: SimulatedNode) -> bool:
    return node.up and node.connected and not node.lost and not node.leaving and not node.pods


def _with_result(pod: SimulatedPod) -> ObservedExport | None:
    export = pod.observed.export
    return None if export is None else replace(export, result=pod.export_result)
