"""What a queue adds to the pods that it admits: from the assigned flavors and from admission checks. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Admission:
    """Additions to all pods of a gang."""

    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    gates: tuple[str, ...] = ()
    """Names of scheduling gates."""


def admit(pod: dict[str, Any], admission: Admission) -> dict[str, Any]:
    """Return a pod with the additions of its queue. They are added last: they are those of the reserved quota."""
    meta, spec = dict(pod["metadata"]), dict(pod["spec"])
    for part, name, added in (
        (meta, "labels", admission.labels),
        (meta, "annotations", admission.annotations),
        (spec, "nodeSelector", admission.node_selector),
    ):
        if added:
            part[name] = {**(part.get(name) or {}), **added}
    known = list(spec.get("tolerations") or ())
    if fresh := [dict(each) for each in admission.tolerations if dict(each) not in known]:
        spec["tolerations"] = known + fresh
    gates = list(spec.get("schedulingGates") or ())
    if new := [{"name": name} for name in admission.gates if {"name": name} not in gates]:
        spec["schedulingGates"] = gates + new
    return {**pod, "metadata": meta, "spec": spec}
