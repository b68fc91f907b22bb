"""Names of the APIs by which the pods of a gang receive their nodes together."""

from __future__ import annotations

from finetune_operator.api.job import GROUP, SchedulingMode

GATE = f"{GROUP}/gang"
"""Scheduling gate of a pod whose gang is not complete yet."""
POD_GROUP = "PodGroup"
"""Kind of the objects of all three APIs."""

SERVED_VERSIONS = {
    SchedulingMode.POD_GROUP: ("scheduling.k8s.io/v1beta1", "scheduling.k8s.io/v1alpha2"),
    SchedulingMode.VOLCANO: ("scheduling.volcano.sh/v1beta1",),
    SchedulingMode.COSCHEDULING: ("scheduling.x-k8s.io/v1alpha1",),
}
"""API versions with a PodGroup that the operator can write, the preferred one first."""
PRODUCTS = {
    SchedulingMode.POD_GROUP: "Kubernetes 1.36 or newer with the feature gates GenericWorkload and GangScheduling",
    SchedulingMode.VOLCANO: "Volcano",
    SchedulingMode.COSCHEDULING: "the scheduler plugin Coscheduling",
}
"""What serves each API."""

VOLCANO_GROUP = "scheduling.k8s.io/group-name"
"""Annotation of a pod: its PodGroup of Volcano."""
VOLCANO_QUEUE = "scheduling.volcano.sh/queue-name"
"""Annotation of a pod: the queue of Volcano that it is charged to."""
COSCHEDULING_GROUP = "scheduling.x-k8s.io/pod-group"
"""Label of a pod: its PodGroup of Coscheduling."""
SCHEDULERS = {SchedulingMode.VOLCANO: "volcano", SchedulingMode.COSCHEDULING: "scheduler-plugins-scheduler"}
"""Default scheduler of the pods: the name under which each is installed next to Kubernetes' own scheduler."""
