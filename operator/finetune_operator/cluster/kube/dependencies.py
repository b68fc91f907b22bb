"""The objects that a KubeCluster works with; `term` makes them."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.cluster.kube.client.client import KubeApi
from finetune_operator.cluster.kube.client.events import EventSender
from finetune_operator.cluster.kube.watch.nodes import NodeStates
from finetune_operator.cluster.kube.work.queue import WorkQueue
from finetune_operator.cluster.protocol import Clock, JobKey


@dataclass(frozen=True)
class ClusterDependencies:
    """Objects that the cluster works with."""

    api: KubeApi
    queue: WorkQueue[JobKey]
    events: EventSender
    clock: Clock
    nodes: NodeStates
