"""Real training processes whose admission Kueue's real controller decides: evicted, admitted again, the same weights.

kwok's pods run no processes. So the pods of this job are processes of the local cluster, and its Workload is an object
of the API server; the plan and the reconcile are those of a cluster.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.kueue import API_VERSION, JOB_UID_LABEL, WORKLOAD
from finetune_operator.cli.clock import utc_now
from finetune_operator.cluster.local import runner
from finetune_operator.cluster.local.cluster import LocalCluster
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.jobs import create_job
from finetune_operator.cluster.local.settings import LOCAL
from finetune_operator.cluster.observe_workload import Flavor, observe_workload
from finetune_operator.cluster.reconcile import ReconcileResult
from finetune_operator.plan.model.types import Action, Create, DeleteWorkload, Observed, PatchWorkload
from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.queues import GROUP, ROOT, Kueue
from testing.controlplane.server import ControlPlane
from testing.operator.harness import Jobs

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_STEPS, EVICTED_AT, PREEMPTED_AT = 60, 5, 20
CPUS = 8
"""Quota of the queue."""
URGENT = "urgent"
POLL_SECONDS = 0.25
CONFLICT = 409


class QueuedLocalCluster(LocalCluster):
    """A local cluster whose Workloads are objects of an API server with Kueue."""

    plane: ClassVar[ControlPlane]
    namespace: ClassVar[str]

    async def observe(self, job: FineTuneJob) -> Observed:
        """Return the state of the processes, and the Workloads of the API server."""
        found = await super().observe(job)
        things = await asyncio.to_thread(self.plane.api.get, f"{ROOT}/namespaces/{self.namespace}/workloads")
        # There is no watch.
        asyncio.get_running_loop().call_later(POLL_SECONDS, self.wake.set)
        own = (thing for thing in things["items"] if thing["metadata"]["name"] != URGENT)
        assigned = (observe_workload(thing, is_owned=True) for thing in own)
        no_labels = {"pool": Flavor({}, ())}
        return replace(found, workloads=tuple(each.with_flavors(no_labels) for each in assigned))

    async def apply(self, job: FineTuneJob, action: Action) -> None:
        """Write Workloads to the API server, and everything else to this machine."""
        path, api = f"{ROOT}/namespaces/{self.namespace}/workloads", self.plane.api
        if isinstance(action, Create) and action.manifest["kind"] == WORKLOAD:
            thing = json.loads(json.dumps(action.manifest))
            # The API server would delete an object whose owner it does not have, and Kueue one that has lost its owner.
            del thing["metadata"]["ownerReferences"], thing["metadata"]["labels"][JOB_UID_LABEL]
            thing["metadata"]["namespace"] = self.namespace
            await asyncio.to_thread(api.create, path, thing)
        elif isinstance(action, PatchWorkload):
            target = f"{path}/{action.name}{'/status' if action.status else ''}"
            try:
                await asyncio.to_thread(api.patch, target, dict(action.patch))
            except ControlPlaneApiError as error:
                # As on a cluster: the newer object causes another reconcile.
                if error.code != CONFLICT:
                    raise
        elif isinstance(action, DeleteWorkload):
            await asyncio.to_thread(api.delete, f"{path}/{action.name}")
        else:
            await super().apply(job, action)


class Evictor:
    """Evicts the job twice: its queue is drained, then a Workload of a higher priority preempts it.

    Each eviction begins at a step, and ends when the quota is released.
    """

    def __init__(self, plane: ControlPlane, controller: Kueue, queue: str) -> None:
        self._controller = controller
        self._queue = queue
        self._urgent = UrgentWorkload(plane, queue)
        self.reserved_with_pods: list[bool] = []
        """Whether quota was reserved, at each reconcile with pods after an eviction."""
        self._left: list[tuple[int, Callable[[], None], Callable[[], None]]] = [
            (EVICTED_AT, partial(self._set_queue, "HoldAndDrain"), partial(self._set_queue, "None")),
            (PREEMPTED_AT, self._urgent.create, self._urgent.delete),
        ]
        self._num_begun = 0
        self.num_ended = 0

    def on_reconcile(self, result: ReconcileResult) -> None:
        """Drive the evictions by the state of the job."""
        if result.job is None or not self._left:
            return
        status = result.job.status
        at_step, evict, restore = self._left[0]
        reserved = any(each.num_admitted is not None for each in result.observed.workloads)
        if self._num_begun == self.num_ended:
            if (status.step or 0) >= at_step and status.phase == "Running":
                self._num_begun += 1
                evict()
        elif sum(each.reason == "EvictedByQueue" for each in status.attempts) == self._num_begun:
            if result.observed.pods:
                self.reserved_with_pods.append(reserved)
            elif not reserved:
                restore()
                self._left.pop(0)
                self.num_ended += 1

    def _set_queue(self, stop: str) -> None:
        set_queue(self._controller, self._queue, stop)

    def warn(self, message: str) -> None:
        """Ignore warnings."""


class Undisturbed(Evictor):
    """Evicts nothing."""

    def on_reconcile(self, result: ReconcileResult) -> None:
        """Ignore the state of the job."""


class UrgentWorkload:
    """A Workload of a higher priority that needs all CPUs of a queue."""

    def __init__(self, plane: ControlPlane, queue: str) -> None:
        self._api = plane.api
        self._queue = queue
        self._path = f"{ROOT}/namespaces/{queue}/workloads"

    def create(self) -> None:
        """Request the quota."""
        container = {"name": URGENT, "image": URGENT, "resources": {"requests": {"cpu": str(CPUS)}}}
        template = {"spec": {"containers": [container], "restartPolicy": "Never"}}
        spec = {
            "queueName": self._queue,
            "podSets": [{"name": URGENT, "count": 1, "template": template}],
            "priority": 1000,
            "priorityClassRef": {"group": GROUP, "kind": "WorkloadPriorityClass", "name": "high"},
        }
        thing = {"apiVersion": API_VERSION, "kind": WORKLOAD, "metadata": {"name": URGENT}, "spec": spec}
        self._api.create(self._path, thing)

    def delete(self) -> None:
        """Release the quota."""
        self._api.delete(f"{self._path}/{URGENT}")


def set_queue(controller: Kueue, name: str, stop: str) -> None:
    flavors = [{"name": "pool", "cpu": CPUS, "memory": "64Gi"}]
    controller.add_queue(name, name, flavors, preemption={"withinClusterQueue": "LowerPriority"}, stopPolicy=stop)


def manifest(folder: Path, **spec: Any) -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((REPOSITORY / "examples/local/lora-circles.yaml").read_text())
    job["metadata"]["name"] = "circles"
    own = job["spec"]
    own["model"]["base"], own["dataset"]["source"] = str(REPOSITORY / "examples/base-circles"), str(folder / "data")
    own["training"].pop("validation", None)
    own["training"] |= {"steps": NUM_STEPS, "batchSize": 2, "lrWarmupSteps": 2}
    own["checkpoint"] = {"interval": {"steps": 1000}, "storage": {"hostPath": {"path": str(folder / "shared")}}}
    own["recovery"] = {"noticeSeconds": 60}
    own["topology"]["resources"] = {"cpu": "1"}
    own["outputs"] = [{"format": "diffusers", "to": str(folder / "shared/out")}]
    own |= spec
    return job


def run_job(folder: Path, observer: Evictor, **spec: Any) -> tuple[ReconcileResult, str]:
    """Run a job to its end; return the last result and the digest of its weights."""
    (folder / "shared").mkdir(parents=True)
    home = Home(folder / "state")
    job = create_job(home, FineTuneJob.model_validate(manifest(folder, **spec)), utc_now)
    run = runner.LocalRun(home, job, observer, utc_now, replace(LOCAL, kueue=bool(spec)))
    result = asyncio.run(run.run())
    digest = hashlib.sha256()
    files = sorted((folder / "shared/out").glob("*.safetensors"))
    assert files
    for file in files:
        digest.update(file.read_bytes())
    return result, digest.hexdigest()


@pytest.mark.timeout(600)
def test_an_evicted_training_ends_with_the_undisturbed_weights(
    team: Jobs, queue_plane: tuple[ControlPlane, Kueue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane, controller = queue_plane
    for name in ("undisturbed", "queued"):
        data = tmp_path / name / "data"
        data.parent.mkdir()
        command = [sys.executable, "-m", "finetune_trainer.demo.circles", str(data), "--style", "stripes"]
        subprocess.run([*command, "--num-train", "16", "--num-validation", "4"], check=True, stdout=subprocess.DEVNULL)
    evictor = Evictor(plane, controller, team.namespace)
    set_queue(controller, team.namespace, stop="None")
    _, expected = run_job(tmp_path / "undisturbed", Undisturbed(plane, controller, team.namespace))
    QueuedLocalCluster.plane, QueuedLocalCluster.namespace = plane, team.namespace
    monkeypatch.setattr(runner, "LocalCluster", QueuedLocalCluster)
    result, weights = run_job(tmp_path / "queued", evictor, queueName=team.namespace)
    assert result.job is not None
    status = result.job.status
    assert evictor.num_ended == 2
    assert status.phase == "Succeeded"
    evicted = [("EvictedByQueue", 0)] * 2
    assert [(each.reason, each.lost_steps) for each in status.attempts if each.reason is not None][:2] == evicted
    assert (status.attempt, status.preemptions, status.failures) == (3, 2, 0)
    assert evictor.reserved_with_pods, "pods existed after the eviction"
    assert all(evictor.reserved_with_pods), "the quota was kept until they had saved"
    assert weights == expected
