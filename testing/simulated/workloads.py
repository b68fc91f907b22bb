"""Kueue's Workloads as the API server stores them: what the operator writes, and what Kueue decides about them.

Used by the simulation and by the tests of the plan. The operator reads them with the same code as on a cluster.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from finetune_operator.api import labels
from finetune_operator.cluster.observe_workload import Flavor, observe_workload
from finetune_operator.plan.model.admission import ADMITTED, EVICTED, FINISHED, QUOTA_RESERVED, REQUEUED
from finetune_operator.plan.model.types import Manifest, ObservedWorkload, PatchWorkload

Json = dict[str, Any]


class StaleWriteError(Exception):
    """The Workload has changed since the writer read it."""


class WorkloadStore:
    """All Workloads of one namespace."""

    def __init__(self) -> None:
        self.stored: dict[str, Json] = {}
        self._version = 0
        self._num_created = 0

    # -- requests of the operator -------------------------------------------------------------------------------------

    def create(self, manifest: Manifest, now: datetime) -> Json:
        """Create a Workload, unless it exists; return it."""
        name = manifest["metadata"]["name"]
        if name not in self.stored:
            self._num_created += 1
            thing = copy.deepcopy(dict(manifest)) | {"status": {}}
            thing["metadata"] |= {"uid": f"workload-{self._num_created}", "creationTimestamp": now.isoformat()}
            self._store(thing)
        return self.stored[name]

    def patch(self, action: PatchWorkload) -> Json | None:
        """Change a Workload by a merge patch; return it, or None if it no longer exists.

        Raises:
            StaleWriteError: it has another UID or another resource version than the patch.
        """
        old = self.stored.get(action.name)
        if old is None:
            return None
        expected = {name: action.patch["metadata"].get(name) for name in ("uid", "resourceVersion")}
        if any(value is not None and value != old["metadata"][name] for name, value in expected.items()):
            raise StaleWriteError
        new = _merged(old, action.patch)
        # The status of an object and the rest of it are written separately.
        kept = {"spec": old["spec"]} if action.status else {"status": old["status"]}
        return self._store(new | kept)

    def delete(self, name: str, uid: str) -> None:
        """Delete a Workload, if it still has this UID."""
        if name in self.stored and self.stored[name]["metadata"]["uid"] == uid:
            del self.stored[name]

    # -- decisions of Kueue -------------------------------------------------------------------------------------------

    def admit(self, name: str, now: datetime, count: int | None = None, flavor: str = "") -> Json:
        """Admit a Workload, for fewer pods than it requests if a number is given."""
        thing = copy.deepcopy(self.stored[name])
        pod_set = thing["spec"]["podSets"][0]
        assignment: Json = {"name": pod_set["name"], "count": count or pod_set["count"]}
        if flavor:
            assignment["flavors"] = {"cpu": flavor}
        thing["status"]["admission"] = {"clusterQueue": thing["spec"]["queueName"], "podSetAssignments": [assignment]}
        for kind, status in ((QUOTA_RESERVED, "True"), (ADMITTED, "True"), (EVICTED, "False")):
            if status == "True" or is_true(thing, kind):
                _set(thing, now, kind, status, kind, "")
        return self._store(thing)

    def evict(self, name: str, now: datetime, reason: str = "Preempted", message: str = "for another job") -> Json:
        """Evict an admitted Workload; its owner releases the quota."""
        thing = copy.deepcopy(self.stored[name])
        _set(thing, now, EVICTED, "True", reason, message)
        return self._store(thing)

    def finish(self, name: str, now: datetime, reason: str) -> Json:
        """Finish a Workload that another one replaces."""
        thing = copy.deepcopy(self.stored[name])
        _set(thing, now, FINISHED, "True", reason, "")
        return self._store(thing)

    def requeue(self, name: str, now: datetime) -> Json:
        """Queue a Workload again."""
        thing = copy.deepcopy(self.stored[name])
        _set(thing, now, REQUEUED, "True", "BackoffFinished", "")
        return self._store(thing)

    def explain(self, name: str, now: datetime, reason: str, message: str) -> Json:
        """Write why a Workload waits."""
        thing = copy.deepcopy(self.stored[name])
        _set(thing, now, QUOTA_RESERVED, "False", reason, message)
        return self._store(thing)

    def _store(self, thing: Json) -> Json:
        self._version += 1
        thing["metadata"] = thing["metadata"] | {"resourceVersion": str(self._version)}
        self.stored[thing["metadata"]["name"]] = thing
        return thing


def observe(thing: Json, flavors: Mapping[str, Flavor] | None = None) -> ObservedWorkload:
    """Return a Workload as the plan reads it."""
    return observe_workload(thing, is_owned=bool(thing["metadata"].get("ownerReferences"))).with_flavors(flavors or {})


def job_of(thing: Json) -> str:
    """Return the name of a Workload's job."""
    name: str = thing["metadata"]["labels"][labels.JOB]
    return name


def is_true(thing: Json, kind: str) -> bool:
    """Return whether a condition is True."""
    conditions = thing["status"].get("conditions") or ()
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)


def is_reserved(thing: Json) -> bool:
    """Return whether a Workload uses quota."""
    return bool(thing["status"].get("admission")) and not is_true(thing, FINISHED)


def _set(  # noqa: PLR0917  the fields of a condition
    thing: Json, now: datetime, kind: str, status: str, reason: str, message: str
) -> None:
    others = [each for each in thing["status"].get("conditions") or () if each["type"] != kind]
    new = {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now.isoformat()}
    thing["status"]["conditions"] = [*others, new]


def _merged(old: Any, patch: Any) -> Any:
    """Return the result of a JSON merge patch."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    result = dict(old) if isinstance(old, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _merged(result.get(name), value)
    return result
