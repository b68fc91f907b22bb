"""Scheduler, kubelets and node controller of the simulation: what becomes of pods on nodes that come and go."""

from __future__ import annotations

from collections.abc import Callable

from finetune_contract.heartbeat import Termination
from finetune_operator.plan.model.types import PodPhase
from testing.simulated.engine import Engine
from testing.simulated.model import Node, SimPod
from testing.simulated.server import Server

NO_ROOM = "Unschedulable: no node has room"
SILENT_SECONDS = 40.0
"""After so long without its kubelet, a node's Ready turns Unknown."""
TOLERATION_SECONDS = 300.0
"""After so long more, its pods are deleted, in vain."""
SHUTDOWN = "TerminationByKubelet"


class Kubelets:
    """All nodes. `start` is called with every pod whose container starts."""

    def __init__(self, engine: Engine, server: Server, start: Callable[[SimPod], None]) -> None:
        self.pull_seconds = 5.0
        """Mean time from a node to a running container."""
        self.cached_seconds: float | None = None
        """The same where the node has run one before; None: the same."""
        self._engine = engine
        self._server = server
        self._start = start
        self._waiting: list[SimPod] = []
        self._num_nodes = 0
        server.pod_changed = self._pod_changed

    # -- pods ---------------------------------------------------------------------------------------------------------

    def _pod_changed(self, pod: SimPod) -> None:
        if self._server.pods.get(pod.seen.name) is not pod:
            self.schedule()
        elif pod.node is None:
            self._waiting.append(pod)
            self.schedule()
        elif pod.node.connected:
            self._terminate(pod)

    def schedule(self) -> None:
        """Give pods that wait a node each, first come, first served."""
        still = []
        for pod in self._waiting:
            if self._server.pods.get(pod.seen.name) is not pod:
                continue
            node = self._room_for(pod)
            if node is None:
                still.append(pod)
                if pod.seen.waiting != NO_ROOM:
                    self._server.change(pod, waiting=NO_ROOM)
                continue
            node.pods.add(pod.seen.name)
            pod.node = node
            self._server.change(pod, node=node.name, waiting="ContainerCreating")
            mean = self.cached_seconds if node.has_image and self.cached_seconds is not None else self.pull_seconds
            node.has_image = True
            self._engine.after(self._engine.rng.expovariate(1 / mean), lambda pod=pod: self._run(pod))  # type: ignore[misc]
        self._waiting = still

    def _room_for(self, pod: SimPod) -> Node | None:
        """A node for a pod; spot ones before others, as everybody prefers them."""
        free = [node for node in self._server.nodes.values() if _has_room(node) and (node.spot or not pod.spot_only)]
        return next((node for node in free if node.spot), free[0] if free else None)

    def _run(self, pod: SimPod) -> None:
        node = pod.node
        there = self._server.pods.get(pod.seen.name) is pod and pod.seen.deleted_at is None
        if node is None or not there or not node.up or pod.seen.phase is not PodPhase.PENDING:
            return
        if not node.connected:
            # Its kubelet does not hear what it should do.
            self._engine.after(5.0, lambda: self._run(pod))
            return
        pod.running = True
        # Those that ended are forgotten here.
        node.started = [*(other for other in node.started if other.running), pod]
        self._server.change(pod, phase=PodPhase.RUNNING, ready=True, waiting=None)
        self._start(pod)

    def _terminate(self, pod: SimPod) -> None:
        """SIGTERM now, SIGKILL when the grace is over."""
        if pod.running:
            left = pod.seen.grace.total_seconds()
            self._engine.after(left, lambda: self._kill(pod))
            pod.notice()
        elif pod.seen.phase is PodPhase.PENDING:
            self._engine.after(0.1, lambda: self._server.remove(pod))

    def _kill(self, pod: SimPod) -> None:
        if pod.running and pod.node is not None and pod.node.connected and pod.seen.deleted_at is not None:
            over_at = pod.seen.deleted_at + pod.seen.grace
            if self._engine.now() >= over_at:
                pod.end(137)

    def ended(self, pod: SimPod, code: int, termination: Termination | None, reason: str | None = None) -> None:
        """The processes of a pod have ended; the API hears of it where the node can tell."""
        if not pod.running:
            return
        pod.running = False
        delay = self._engine.rng.uniform(0.05, 1.0)
        self._engine.after(delay, lambda: self._report_end(pod, code, termination, reason))

    def _report_end(self, pod: SimPod, code: int, termination: Termination | None, reason: str | None) -> None:
        node = pod.node
        if node is None or not node.up or self._server.pods.get(pod.seen.name) is not pod:
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
            reason=pod.seen.reason or reason,
        )
        node.pods.discard(pod.seen.name)
        if pod.seen.deleted_at is not None:
            self._engine.after(0.1, lambda: self._server.remove(pod))
        self.schedule()

    # -- nodes --------------------------------------------------------------------------------------------------------

    def add_node(self, *, spot: bool = True, skew_seconds: float = 0.0) -> Node:
        """A new machine, with a name that none had before."""
        self._num_nodes += 1
        node = Node(f"node-{self._num_nodes}", spot=spot, skew_seconds=skew_seconds)
        self._server.nodes[node.name] = node
        self.schedule()
        return node

    def preempt(self, node: Node, notice_seconds: float, *, tainted: bool) -> None:
        """A node will be taken away: announced by a taint, or by the kubelet that ends its pods."""
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

    def remove_node(self, node: Node) -> None:
        """The machine and its Node object go; the garbage collector takes its pods later."""
        self._power_off(node)
        node.connected = False
        node.exists = False
        node.lost = True
        if self._server.nodes.pop(node.name, None) is None:
            return
        self._server.node_changed(node)
        self._engine.after(self._engine.rng.uniform(1.0, 60.0), lambda: self._collect(node))

    def die(self, node: Node, *, loud: bool) -> None:
        """The machine stops, and its Node stays for a while. Peers see closed connections (loud), or only silence."""
        self._power_off(node, loud=loud)
        node.connected = False
        self._engine.after(SILENT_SECONDS, lambda: self._lose(node))
        self._engine.after(self._engine.rng.uniform(60.0, 900.0), lambda: self.remove_node(node))

    def disconnect(self, node: Node, seconds: float) -> None:
        """A node's control plane is out of reach for a while; what runs on it runs on."""
        if node.up and node.connected:
            node.connected = False
            self._engine.after(SILENT_SECONDS, lambda: self._lose(node))
            self._engine.after(seconds, lambda: self._reconnect(node))

    def _lose(self, node: Node) -> None:
        if node.connected or not node.exists or node.lost:
            return
        node.lost = True
        self._server.node_changed(node)
        self._engine.after(TOLERATION_SECONDS, lambda: self._evict_all(node))

    def _evict_all(self, node: Node) -> None:
        if node.lost and node.exists:
            for pod in self._pods_of(node):
                self._server.evict(pod, "DeletionByTaintManager")

    def _reconnect(self, node: Node) -> None:
        if not node.up or not node.exists:
            return
        node.connected = True
        if node.lost:
            node.lost = False
            self._server.node_changed(node)
        for pod in list(self._server.pods.values()):
            if pod.node is node and pod.seen.deleted_at is not None:
                # What it was asked for meanwhile; its grace begins now.
                self._server.change(pod, deleted_at=self._engine.now())
                self._terminate(pod)
        for pod in list(self._orphans(node)):
            pod.end(137)
        self.schedule()

    def _orphans(self, node: Node) -> list[SimPod]:
        """Pods that run here and that the API knows no more: they were deleted by force."""
        return [pod for pod in node.started if pod.running and self._server.pods.get(pod.seen.name) is not pod]

    def _power_off(self, node: Node, *, loud: bool = False) -> None:
        if node.up:
            node.up = False
            for pod in node.started:
                if pod.running:
                    pod.running = False
                    pod.end(-2 if loud else -1)

    def _collect(self, node: Node) -> None:
        for pod in self._pods_of(node):
            if pod.seen.phase not in (PodPhase.SUCCEEDED, PodPhase.FAILED) and pod.seen.disruption is None:
                self._server.change(pod, disruption="DeletionByPodGC")
            self._server.remove(pod)

    def _pods_of(self, node: Node) -> list[SimPod]:
        return [pod for pod in self._server.pods.values() if pod.node is node]


def _has_room(node: Node) -> bool:
    return node.up and node.connected and not node.lost and not node.leaving and not node.pods
