"""The jobs that faults are injected into: a method or a script, on two nodes with one rank each, over gloo."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from finetune_operator.api.job import API_VERSION, KIND
from testing.controlplane.process import wait_for
from testing.controlplane.server import KubectlError
from testing.realnodes.names import HOME, NAME, OURS, TEAM
from testing.realnodes.store import CLAIM, MOUNT, OUTPUTS, SCRIPT, KubectlCluster, Object, Store, apply

STEPS, SAVE_EVERY, FAULT_STEP = 40, 10, 14
LONG_STEPS, SHORT_STEPS = 200, 120
"""Steps of a job that trains longer than the operator is unavailable during an upgrade or a reschedule."""
SCRIPT_STEPS = 80
SCRIPT_ARGS = {
    "max_train_steps": SCRIPT_STEPS,
    "train_batch_size": 32,
    "gradient_accumulation_steps": 12,
    "num_samples": 4096,
    "use_ema": True,
    "seed": 3,
}
"""Arguments of the script; a step takes about 0.1 s."""
RUN_SECONDS = 600.0
POLL_SECONDS = 0.5
"""Pause between calls of kubectl. Each call takes 0.3 s of CPU time from the job."""
ENDED = ("Succeeded", "Failed")


T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What a job trains."""

    steps: int
    is_script: bool = False

    @property
    def training(self) -> Object:
        """Return the fields below `spec.training`."""
        if self.is_script:
            return {"script": {"path": f"{MOUNT}/{SCRIPT}", "args": SCRIPT_ARGS}}
        return {
            "method": "LoRA",
            "steps": self.steps,
            "batchSize": 4,
            "learningRate": 1e-3,
            "resolution": 64,
            "lora": {"rank": 4},
        }


SCRIPT_WORK = Work(SCRIPT_STEPS, is_script=True)


@dataclass
class JobsHarness:
    """Creates and observes jobs in their namespace."""

    cluster: KubectlCluster
    store: Store

    def prepare(self) -> None:
        """Create a namespace that enforces the restricted Pod Security Standard, and the volume with model and data."""
        enforce = {"pod-security.kubernetes.io/enforce": "restricted"}
        make_namespace(self.cluster, TEAM, enforce)
        self.store.prepare(self.cluster)

    def create(self, name: str, work: Work) -> None:
        apply(self.cluster, build_job(name, work, self.store.pod_template))

    def status(self, name: str) -> dict[str, Any]:
        got = self.cluster.kubectl("--namespace", TEAM, "get", "ftj", name, "--output=json")
        status: dict[str, Any] = json.loads(got).get("status", {})
        return status

    def pods(self, name: str) -> list[dict[str, Any]]:
        """Return the pods of a job that are not being deleted."""
        selector = f"--selector=finetune-operator.io/job={name}"
        items = json.loads(self.cluster.kubectl("--namespace", TEAM, "get", "pods", selector, "--output=json"))["items"]
        return [pod for pod in items if not pod["metadata"].get("deletionTimestamp")]

    def wait_pods(self, name: str) -> list[dict[str, Any]]:
        """Wait until the job has pods; return them."""
        return self._wait(f"{name} has pods", lambda: self.pods(name))

    def wait_step(self, name: str, step: int) -> dict[str, Any]:
        """Wait until the job trains and has finished this step; return its status."""

        def probe() -> dict[str, Any]:
            status = self.status(name)
            if status.get("phase") in ENDED:
                raise AssertionError(f"{name} ended before step {step}: {json.dumps(status)}")
            trains = status.get("phase") == "Running" and (status.get("step") or 0) >= step
            return status if trains else {}

        return self._wait(f"{name} reaches step {step}", probe)

    def wait_end(self, name: str) -> dict[str, Any]:
        """Wait until the job has succeeded or failed; return its status."""

        def probe() -> dict[str, Any]:
            status = self.status(name)
            return status if status.get("phase") in ENDED else {}

        return self._wait(f"{name} ends", probe)

    def wait_next_attempt(self, name: str, attempt: int) -> float:
        """Wait until a later attempt has finished a step; return that time in seconds since the epoch."""

        def probe() -> str:
            status = self.status(name)
            if status.get("phase") in ENDED and status["attempt"] == attempt:
                raise AssertionError(f"{name} ended, and its attempt {attempt} was never interrupted")
            newest = (status.get("attempts") or [{}])[-1]
            return newest.get("trainingAt") or "" if newest.get("attempt", 0) > attempt else ""

        stepped = self._wait(f"{name} takes its next step", probe)
        return datetime.datetime.fromisoformat(stepped).timestamp()

    def wait_new_leader(self, name: str, previous: str) -> float:
        """Wait until an operator pod other than `previous` leads and reports a step; return that time."""

        def probe() -> dict[str, Any]:
            status = self.status(name)
            if status.get("phase") in ENDED:
                raise AssertionError(f"{name} ended before another operator pod led; give the job more steps")
            return status if self.leader() not in ("", previous) else {}

        step = self._wait("another operator pod leads", probe).get("step", 0)
        self._wait(f"{name} reports its next step", lambda: self.status(name).get("step", 0) > step)
        return time.time()

    def leader(self) -> str:
        """Return the UID of the leading operator pod; empty if none leads."""
        lease = json.loads(self.cluster.kubectl("--namespace", HOME, "get", "lease", NAME, "--output=json"))
        return lease["spec"].get("holderIdentity") or ""

    def describe(self, name: str) -> str:
        """Return the objects, events and logs that explain why a job failed."""
        selector = f"--selector=finetune-operator.io/job={name}"
        commands = (
            ("get", "ftj", name, "--output=yaml"),
            ("get", "pods", "--output=wide"),
            ("get", "events", "--sort-by=.metadata.creationTimestamp"),
            ("logs", selector, "--prefix", "--tail=40"),
        )
        return "\n".join(self._try_kubectl("--namespace", TEAM, *arguments) for arguments in commands)

    def _try_kubectl(self, *arguments: str) -> str:
        try:
            return self.cluster.kubectl(*arguments)
        except KubectlError as error:
            return str(error)

    @staticmethod
    def _wait(what: str, probe: Callable[[], T]) -> T:
        return wait_for(what, probe, RUN_SECONDS, POLL_SECONDS)

    def weights(self, name: str) -> str:
        """Return a hash of the trained files."""
        found = self.store.weights(self.cluster, name)
        assert found, f"{name} wrote no weights"
        return found


def make_namespace(cluster: KubectlCluster, name: str, labels: dict[str, str] | None = None) -> None:
    """Create a namespace that a later run recognizes as created by this test."""
    metadata = {"name": name, "labels": {OURS: "true", **(labels or {})}}
    apply(cluster, {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})


def build_job(name: str, work: Work, pod_template: Object) -> Object:
    """Return a job with one rank on each of two nodes."""
    apart = {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {"finetune-operator.io/job": name}},
    }
    template = {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": TEAM},
        "spec": {
            "model": {"base": f"{MOUNT}/base"},
            "dataset": {"source": f"{MOUNT}/data"},
            "training": work.training,
            "topology": {"accelerator": "cpu", "nodes": 2, "resources": {"cpu": "1", "memory": "1Gi"}},
            "checkpoint": {
                "storage": {"persistentVolumeClaim": {"claimName": CLAIM}},
                "interval": {"steps": SAVE_EVERY},
            },
            "recovery": {"noticeSeconds": 30},
            "outputs": [{"format": "asWritten" if work.is_script else "diffusers", "to": f"{MOUNT}/{OUTPUTS}/{name}"}],
            "podTemplate": {"spec": {**template, **pod_template}},
        },
    }
