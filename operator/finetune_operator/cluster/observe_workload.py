"""Conversion of Kueue's Workloads and flavors from their API form to what the plan reads. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from finetune_operator.api import kueue, labels
from finetune_operator.manifests.admission import Admission
from finetune_operator.manifests.workload import PREFERRED, REQUIRED, UNCONSTRAINED
from finetune_operator.plan.model.types import ObservedWorkload, WorkloadCondition

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Flavor:
    """What pods need in order to run on the nodes of a ResourceFlavor."""

    node_labels: Mapping[str, str]
    tolerations: tuple[Json, ...]


@dataclass(frozen=True)
class AssignedWorkload:
    """A Workload without the additions of its flavors, which are other objects."""

    observed: ObservedWorkload
    flavors: tuple[str, ...]
    """Names of the assigned flavors, without repetitions."""

    def with_flavors(self, known: Mapping[str, Flavor]) -> ObservedWorkload:
        """Return the Workload with the additions of its flavors; unknown additions if one of them is not known."""
        if not self.flavors:
            return self.observed
        if any(name not in known for name in self.flavors):
            return replace(self.observed, update=None)
        added = self.observed.update or Admission()
        selector, tolerations = dict(added.node_selector), list(added.tolerations)
        for name in self.flavors:
            selector |= known[name].node_labels
            tolerations += [each for each in known[name].tolerations if each not in tolerations]
        return replace(self.observed, update=replace(added, node_selector=selector, tolerations=tuple(tolerations)))


def observe_flavor(thing: Json) -> Flavor:
    """Read a ResourceFlavor."""
    spec = thing.get("spec") or {}
    return Flavor(dict(spec.get("nodeLabels") or {}), tuple(spec.get("tolerations") or ()))


def observe_workload(thing: Json, *, is_owned: bool) -> AssignedWorkload:
    """Read a Workload."""
    meta, spec, status = thing["metadata"], thing.get("spec") or {}, thing.get("status") or {}
    annotations = meta.get("annotations") or {}
    pod_set: Json = next(iter(spec.get("podSets") or ()), {})
    assignment = next(iter((status.get("admission") or {}).get("podSetAssignments") or ()), None)
    observed = ObservedWorkload(
        name=meta["name"],
        uid=meta["uid"],
        version=meta["resourceVersion"],
        created_at=datetime.fromisoformat(meta["creationTimestamp"]),
        queue=spec.get("queueName") or "",
        active=spec.get("active") is not False and not meta.get("deletionTimestamp"),
        num_pods=pod_set.get("count", 1),
        num_admitted=None if assignment is None else assignment.get("count", pod_set.get("count", 1)),
        conditions=tuple(map(_condition, status.get("conditions") or ())),
        update=_additions(meta["name"], pod_set, assignment, status.get("admissionChecks") or ()),
        request=annotations.get(labels.REQUEST),
        replaces=annotations.get(kueue.REPLACES),
        boost=annotations.get(kueue.PRIORITY_BOOST),
        is_owned=is_owned,
    )
    flavors = tuple(dict.fromkeys((assignment or {}).get("flavors", {}).values()))
    return AssignedWorkload(observed, flavors)


def _condition(thing: Json) -> WorkloadCondition:
    return WorkloadCondition(
        thing["type"], thing["status"], thing["reason"], thing.get("message") or "", thing["lastTransitionTime"]
    )


def _place_annotations(request: Json) -> dict[str, str]:
    """Return the annotations by which Kueue recognizes a pod that it must place: those of its own kinds of jobs."""
    if "required" in request:
        return {REQUIRED: request["required"]}
    return {PREFERRED: request["preferred"]} if "preferred" in request else {UNCONSTRAINED: "true"}


def _additions(name: str, pod_set: Json, assignment: Json | None, checks: Iterable[Json]) -> Admission:
    """Return what the admission checks, and the placement by topology, add to the pods."""
    pod_labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    selector: dict[str, str] = {}
    tolerations: list[Json] = []
    gates: tuple[str, ...] = ()
    for check in checks:
        for update in check.get("podSetUpdates") or ():
            if update.get("name") == pod_set.get("name"):
                pod_labels |= update.get("labels") or {}
                annotations |= update.get("annotations") or {}
                selector |= update.get("nodeSelector") or {}
                tolerations += update.get("tolerations") or ()
    if assignment is not None and assignment.get("topologyAssignment"):
        # Kueue removes the gate when it has given the pod the node selector of its place.
        gates = (kueue.TOPOLOGY_GATE,)
        pod_labels[kueue.POD_SET_LABEL] = str(pod_set.get("name"))
        annotations[kueue.POD_WORKLOAD] = name
        annotations |= _place_annotations(pod_set.get("topologyRequest") or {})
    return Admission(pod_labels, annotations, selector, tuple(tolerations), gates)
