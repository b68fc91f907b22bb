"""Kueue in the simulation: one queue with a quota of pods, which it gives, claims back, and changes.

Like the real one it decides a moment after a change, admits fewer pods where a job allows it, replaces the Workload of
a growing job, and waits for the owner of an evicted Workload to release the quota.
"""

from __future__ import annotations

from collections.abc import Callable

from finetune_operator.api import kueue
from finetune_operator.plan.model.types import Manifest, PatchWorkload
from testing.simulated.engine import Engine
from testing.simulated.workloads import Json, StaleWriteError, WorkloadStore, is_reserved, is_true, job_of

QUEUE = "pictures"
REQUEUE_SECONDS = 30.0
"""Time after which a job is queued again if its eviction does not allow that at once."""


class SimulatedQueue:
    """The queue, and the Workloads of all jobs."""

    def __init__(self, engine: Engine, changed: Callable[[str, str, Json | None], None]) -> None:
        """Create a queue without a limit.

        changed: called with the job, the name and the new state of each changed Workload; None: it is deleted.
        """
        self.store = WorkloadStore()
        self.quota: int | None = None
        """Number of pods that may be admitted; None: no limit."""
        self.released: Callable[[str], None] = lambda _: None
        """Called with the job whose quota the operator releases."""
        self.deleted_at: dict[str, float] = {}
        """Time at which somebody else deleted the Workload of a job."""
        self._engine = engine
        self._changed = changed
        self._is_due = False

    # -- requests of the operator -------------------------------------------------------------------------------------

    def create(self, job: str, manifest: Manifest) -> Json:
        """Create a Workload, unless it exists; return it."""
        thing = self.store.create(manifest, self._engine.now())
        self._send(thing)
        assert job_of(thing) == job
        return thing

    def patch(self, action: PatchWorkload) -> Json | None:
        """Change a Workload; return it, or None if it no longer exists or has changed in between."""
        old = self.store.stored.get(action.name)
        try:
            thing = self.store.patch(action)
        except StaleWriteError:
            return None
        if thing is None or old is None:
            return None
        if is_reserved(old) and not is_reserved(thing):
            self.released(job_of(thing))
        self._send(thing)
        if is_true(old, "Evicted") and not is_reserved(thing) and not is_true(thing, "Requeued"):
            self._engine.after(REQUEUE_SECONDS, lambda: self._requeue(action.name))
        return thing

    def delete(self, name: str, uid: str) -> None:
        """Delete a Workload on behalf of the operator."""
        thing = self.store.stored.get(name)
        if thing is not None and thing["metadata"]["uid"] == uid:
            if is_reserved(thing):
                self.released(job_of(thing))
            self._remove(thing)

    def delete_of(self, job: str) -> None:
        """Delete the Workloads of a deleted job."""
        for thing in [each for each in self.store.stored.values() if job_of(each) == job]:
            self._remove(thing)

    def has_quota(self, job: str) -> bool:
        """Return whether pods of a job may exist: an admitted Workload has quota, even while it is being evicted."""
        own = [each for each in self.store.stored.values() if job_of(each) == job]
        return any(is_reserved(each) and is_true(each, "Admitted") for each in own)

    # -- faults -------------------------------------------------------------------------------------------------------

    def evict_one(self) -> None:
        """Evict a random admitted job."""
        rng = self._engine.rng
        names = [name for name, thing in self.store.stored.items() if is_reserved(thing) and not _is_evicted(thing)]
        if names:
            reason = rng.choice(["Preempted", "ClusterQueueStopped", "AdmissionCheck", "NodeFailures"])
            self._send(self.store.evict(rng.choice(names), self._engine.now(), reason))

    def delete_one(self) -> None:
        """Delete a random Workload, as a user may do."""
        if self.store.stored:
            thing = self.store.stored[self._engine.rng.choice(list(self.store.stored))]
            self.deleted_at[job_of(thing)] = self._engine.time
            self._remove(thing)

    def set_quota(self, quota: int | None) -> None:
        """Change the quota, and claim back what is above it."""
        self.quota = quota
        admitted = [each for each in self.store.stored.values() if is_reserved(each) and not _is_evicted(each)]
        over = sum(map(_size, admitted)) - quota if quota is not None else 0
        for thing in reversed(admitted):
            if over > 0:
                over -= _size(thing)
                self._send(self.store.evict(thing["metadata"]["name"], self._engine.now(), "Preempted"))
        self._decide_soon()

    # -- decisions ----------------------------------------------------------------------------------------------------

    def _decide_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._engine.after(self._engine.rng.uniform(0.1, 2.0), self._decide)

    def _decide(self) -> None:
        self._is_due = False
        for thing in list(self.store.stored.values()):
            if thing["metadata"]["name"] in self.store.stored and _waits(thing):
                self._try_to_admit(thing)

    def _try_to_admit(self, thing: Json) -> None:
        store, now, name = self.store, self._engine.now(), thing["metadata"]["name"]
        pod_set, replaces = thing["spec"]["podSets"][0], _replaced_name(thing)
        old = store.stored.get(replaces) if replaces else None
        used = sum(_size(each) for each in store.stored.values() if is_reserved(each) and each is not old)
        free = pod_set["count"] if self.quota is None else self.quota - used
        count = min(pod_set["count"], free)
        if count < pod_set.get("minCount", pod_set["count"]):
            if not is_true(thing, "QuotaReserved") and not _explained(thing):
                self._send(store.explain(name, now, "Pending", f"{max(0, free)} of {pod_set['count']} pods fit"))
            return
        self._send(store.admit(name, now, count))
        if old is not None and is_reserved(old):
            self._send(store.finish(old["metadata"]["name"], now, "WorkloadSliceReplaced"))

    def _requeue(self, name: str) -> None:
        thing = self.store.stored.get(name)
        if thing is not None and not is_reserved(thing):
            self._send(self.store.requeue(name, self._engine.now()))

    def _send(self, thing: Json) -> None:
        self._changed(job_of(thing), thing["metadata"]["name"], thing)
        self._decide_soon()

    def _remove(self, thing: Json) -> None:
        self.store.delete(thing["metadata"]["name"], thing["metadata"]["uid"])
        self._changed(job_of(thing), thing["metadata"]["name"], None)
        self._decide_soon()


def _waits(thing: Json) -> bool:
    conditions = thing["status"].get("conditions") or ()
    held = any(each["type"] == "Requeued" and each["status"] == "False" for each in conditions)
    return not is_reserved(thing) and not is_true(thing, "Finished") and not held


def _explained(thing: Json) -> bool:
    return any(each["type"] == "QuotaReserved" for each in thing["status"].get("conditions") or ())


def _is_evicted(thing: Json) -> bool:
    return is_true(thing, "Evicted") or is_true(thing, "Finished")


def _size(thing: Json) -> int:
    count: int = thing["status"]["admission"]["podSetAssignments"][0]["count"]
    return count


def _replaced_name(thing: Json) -> str:
    annotation: str = thing["metadata"].get("annotations", {}).get(kueue.REPLACES, "")
    return annotation.partition("/")[2]
