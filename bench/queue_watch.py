"""What happened to the jobs of the benchmark of queues: their pods, their Workloads and the steps of their trainers.

kwok's pods run no trainer. The trainers here finish steps while all pods of an attempt run, write a checkpoint at
intervals and on a notice, and end their pods. The trace compares resource versions, which one etcd assigns to all
objects, so it does not depend on the order in which two watches report.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_contract.exit_codes import ExitCode
from finetune_operator.api import labels
from finetune_operator.api.names import CONTAINER
from finetune_operator.cluster.kube.client.client import ApiError, Json, KubeApi
from finetune_operator.cluster.kube.client.objects import PODS, Resource

STEP_SECONDS = 0.1
SAVE_STEPS = 50
TICK_SECONDS = 0.1
STRATEGIC = "application/strategic-merge-patch+json"


@dataclass
class TrainedJob:
    """One job: its pods, and the steps of its trainer."""

    name: str
    size: int
    total_steps: int
    pods: dict[str, Json] = field(default_factory=dict)
    step: int = 0
    saved: int = 0
    num_evictions: int = 0
    num_saved: int = 0
    """Evictions before which every finished step was saved."""
    trained_since: float | None = None
    from_step: int = 0
    is_ending: bool = False


@dataclass
class Trace:
    """Everything that the watches reported."""

    admitted: dict[str, list[tuple[int, bool]]] = field(default_factory=lambda: defaultdict(list))
    """Resource versions at which the admission of a job changed."""
    created: list[tuple[str, int]] = field(default_factory=list)
    """Job and resource version of each created pod."""
    removed: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    living: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    released: list[tuple[str, int]] = field(default_factory=list)
    """Job and resource version of each release of quota."""
    evictions: Counter[str] = field(default_factory=Counter)
    """Number of evictions by Kueue's reason; a preemption has the reason of its own, e.g. `InClusterQueue`."""
    usage: Counter[str] = field(default_factory=Counter)
    """Number of pods with reserved quota, by queue."""
    most: Counter[str] = field(default_factory=Counter)
    """Largest usage of each queue."""
    num_borrowing: int = 0
    """Number of admissions after which a queue used more than its normal quota."""
    lives: list[tuple[str, int, int | None]] = field(default_factory=list)
    """Job, and resource versions of the creation and the removal of each pod."""

    def use(self, queue: str, pods: int, nominal: int) -> None:
        """Add to the usage of a queue, or subtract from it."""
        self.usage[queue] += pods
        self.most[queue] = max(self.most[queue], self.usage[queue])
        self.num_borrowing += pods > 0 and self.usage[queue] > nominal

    def num_unadmitted(self) -> int:
        """Return the number of pods that were created, or still existed, without reserved quota."""
        before = sum(not self._was_admitted(job, version) for job, version in self.created)
        lives = [*self.lives, *((job, born, None) for job, pods in self.living.items() for born in pods.values())]
        after = sum(
            job == name and born < at and (gone is None or gone > at)
            for job, at in self.released
            for name, born, gone in lives
        )
        return before + after

    def _was_admitted(self, job: str, version: int) -> bool:
        states = [state for at, state in self.admitted[job] if at < version]
        return bool(states) and states[-1]


class Trainers:
    """The trainers of all jobs of a namespace, and the trace of what happens to them."""

    def __init__(self, api: KubeApi, namespace: str, workloads: Resource, nominal_pods: int) -> None:
        """Follow nothing yet.

        nominal_pods: number of pods that the normal quota of each queue is for.
        """
        self._api = api
        self._nominal_pods = nominal_pods
        self._evicted: set[str] = set()
        """UIDs of the Workloads that are being evicted."""
        self._namespace = namespace
        self._workloads = workloads
        self.jobs: dict[str, TrainedJob] = {}
        self.trace = Trace()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Follow pods and Workloads, and train, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(PODS.path(self._namespace), self._pod_changed))
            tasks.create_task(self._follow(self._workloads.path(self._namespace), self._workload_changed))
            while True:
                await asyncio.sleep(TICK_SECONDS)
                for job in self.jobs.values():
                    self._advance(job)

    async def _follow(self, path: str, changed: Callable[[str, Json], None]) -> None:
        version = (await self._api.get(path, {"limit": "1"}))["metadata"]["resourceVersion"]
        while True:
            try:
                async for event in self._api.watch(path, {"resourceVersion": version}):
                    if event["type"] == "ERROR":
                        break
                    version = event["object"]["metadata"]["resourceVersion"]
                    changed(event["type"], event["object"])
            except ApiError:
                await asyncio.sleep(0.2)

    # -- events -------------------------------------------------------------------------------------------------------

    def _pod_changed(self, kind: str, pod: Json) -> None:
        meta, trace = pod["metadata"], self.trace
        job, version = self.jobs[meta["labels"][labels.JOB]], int(meta["resourceVersion"])
        if kind == "ADDED":
            trace.created.append((job.name, version))
            trace.living[job.name][meta["uid"]] = version
        if kind == "DELETED":
            trace.lives.append((job.name, trace.living[job.name].pop(meta["uid"]), version))
            known = job.pods.pop(meta["name"], None)
            if known is not None and not job.is_ending and not _has_notice(known):
                # Its node vanished: these steps are lost, and no eviction can save them.
                job.step = job.saved
            self._stop(job)
            return
        job.pods[meta["name"]] = pod
        if meta.get("deletionTimestamp") and not job.is_ending:
            self._notice(job, pod)

    def _workload_changed(self, kind: str, thing: Json) -> None:
        meta, status = thing["metadata"], thing.get("status") or {}
        job, version = self.jobs[meta["labels"][labels.JOB]], int(meta["resourceVersion"])
        states = {each["type"]: each["status"] == "True" for each in status.get("conditions") or ()}
        self._count_eviction(meta["uid"], status.get("conditions") or ())
        now = bool(states.get("Admitted")) and kind != "DELETED" and not states.get("Finished")
        history = self.trace.admitted[job.name]
        before = history[-1][1] if history else False
        if now == before:
            return
        history.append((version, now))
        self.trace.use(thing["spec"]["queueName"], job.size if now else -job.size, self._nominal_pods)
        if before and not states.get("Finished"):
            self.trace.released.append((job.name, version))
            job.num_evictions += 1
            job.num_saved += job.saved == job.step

    def _count_eviction(self, uid: str, conditions: Sequence[Json]) -> None:
        """Count an eviction when it begins."""
        reasons = {each["type"]: each["reason"] for each in conditions if each["status"] == "True"}
        if "Evicted" not in reasons:
            self._evicted.discard(uid)
        elif uid not in self._evicted:
            self._evicted.add(uid)
            self.trace.evictions[reasons.get("Preempted") or reasons["Evicted"]] += 1

    # -- training -----------------------------------------------------------------------------------------------------

    def _advance(self, job: TrainedJob) -> None:
        """Finish steps while all pods of one attempt run."""
        running = [pod for pod in job.pods.values() if _runs(pod)]
        if job.is_ending or len(running) < job.size:
            return
        if job.trained_since is None:
            # The attempt restores the newest checkpoint.
            job.trained_since, job.from_step, job.step = time.monotonic(), job.saved, job.saved
        done = job.from_step + int((time.monotonic() - job.trained_since) / STEP_SECONDS)
        job.step = min(job.total_steps, done)
        job.saved = max(job.saved, job.step // SAVE_STEPS * SAVE_STEPS)
        if job.step == job.total_steps:
            job.saved = job.step
            self._end(job, ExitCode.DONE)

    def _notice(self, job: TrainedJob, pod: Json) -> None:
        """Save the last step if the complete gang still runs and has time; then end its pods."""
        gang = [each for each in job.pods.values() if each["status"].get("phase") == "Running"]
        if _has_notice(pod) and len(gang) == job.size and job.trained_since is not None:
            self._advance_to_now(job)
            job.saved = job.step
            self._end(job, ExitCode.SAVED)

    def _advance_to_now(self, job: TrainedJob) -> None:
        assert job.trained_since is not None
        done = job.from_step + int((time.monotonic() - job.trained_since) / STEP_SECONDS)
        job.step = min(job.total_steps, done)

    def _stop(self, job: TrainedJob) -> None:
        """Stop after a pod is gone: the next attempt begins from the newest checkpoint."""
        job.trained_since = None
        if not job.pods:
            job.is_ending = False

    def _end(self, job: TrainedJob, code: int) -> None:
        job.is_ending, job.trained_since = True, None
        for name in list(job.pods):
            task = asyncio.create_task(self._exit(name, code))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _exit(self, pod: str, code: int) -> None:
        """Write the end of a pod's container, as its kubelet does: again and again until the API server has it."""
        state = {"terminated": {"exitCode": code, "reason": "Completed" if code == 0 else "Error"}}
        container = {"name": CONTAINER, "ready": False, "started": False, "restartCount": 0, "state": state}
        container |= {"image": "trainer", "imageID": ""}
        status: dict[str, Any] = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [container]}
        path = PODS.path(self._namespace, pod, "status")
        while True:
            try:
                await self._api.request("PATCH", path, {"status": status}, content_type=STRATEGIC)
            except ApiError as error:
                if error.transient:
                    await asyncio.sleep(TICK_SECONDS)
                    continue
                if error.status != 404:
                    raise
            return


def _has_notice(pod: Json) -> bool:
    """Return whether a pod is being deleted with time to save."""
    meta = pod["metadata"]
    return bool(meta.get("deletionTimestamp")) and (meta.get("deletionGracePeriodSeconds") or 0) > 1


def _runs(pod: Json) -> bool:
    return pod["status"].get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp")
