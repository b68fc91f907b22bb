"""The job that the faults happen to: the demo's model on two nodes with one rank each, over gloo."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from finetune_operator.api.job import API_VERSION, KIND
from tests.controlplane.process import wait_for
from tests.realnodes.store import CLAIM, MOUNT, OUTPUTS, TEAM, Cluster, Object, Store, apply

STEPS, SAVE_EVERY, FAULT_STEP = 40, 10, 14
RUN_SECONDS = 300.0


@dataclass
class Bed:
    """The namespace of the jobs, and their volume."""

    cluster: Cluster
    store: Store

    def prepare(self) -> None:
        """The volume with the model and the data, in a namespace that enforces the restricted standard."""
        enforce = {"pod-security.kubernetes.io/enforce": "restricted"}
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": TEAM, "labels": enforce}}
        apply(self.cluster, namespace)
        self.store.prepare(self.cluster)

    def create(self, name: str) -> None:
        apply(self.cluster, build_job(name, self.store.pod_template))

    def status(self, name: str) -> dict[str, Any]:
        got = self.cluster.kubectl("--namespace", TEAM, "get", "ftj", name, "--output=json")
        status: dict[str, Any] = json.loads(got).get("status", {})
        return status

    def pods(self, name: str) -> list[dict[str, Any]]:
        """Pods of a job that are not being deleted, by name."""
        selector = f"--selector=finetune-operator.io/job={name}"
        items = json.loads(self.cluster.kubectl("--namespace", TEAM, "get", "pods", selector, "--output=json"))["items"]
        return [pod for pod in items if not pod["metadata"].get("deletionTimestamp")]

    def wait_step(self, name: str, step: int) -> dict[str, Any]:
        """Wait until it trains and has done so many steps."""

        def look() -> dict[str, Any]:
            status = self.status(name)
            if status.get("phase") in ("Failed", "Succeeded"):
                raise AssertionError(f"{name} ended before step {step}: {json.dumps(status)}")
            trains = status.get("phase") == "Running" and (status.get("step") or 0) >= step
            return status if trains else {}

        return wait_for(f"{name} reaches step {step}", look, RUN_SECONDS)

    def wait_end(self, name: str) -> dict[str, Any]:
        """Wait until it has ended, well or not."""

        def look() -> dict[str, Any]:
            status = self.status(name)
            return status if status.get("phase") in ("Succeeded", "Failed") else {}

        return wait_for(f"{name} ends", look, RUN_SECONDS)

    def wait_next_attempt(self, name: str, attempt: int) -> float:
        """Wait until a later attempt has finished a step; returns the time on this machine's clock."""

        def look() -> bool:
            status = self.status(name)
            if status.get("phase") in ("Succeeded", "Failed") and status["attempt"] == attempt:
                raise AssertionError(f"{name} ended, and its attempt {attempt} was never taken away")
            newest = (status.get("attempts") or [{}])[-1]
            return newest.get("attempt", 0) > attempt and newest.get("trainingAt") is not None

        wait_for(f"{name} takes its next step", look, RUN_SECONDS)
        return time.monotonic()

    def wait_news(self, name: str) -> float:
        """Wait until the status tells of a step that it did not tell of yet; returns the time."""
        step = self.status(name).get("step") or 0

        def look() -> bool:
            status = self.status(name)
            return (status.get("step") or 0) > step or status.get("phase") == "Succeeded"

        wait_for(f"{name} tells of its next step", look, RUN_SECONDS)
        return time.monotonic()

    def weights(self, name: str) -> str:
        """Hash of what was trained, file by file."""
        found = self.store.weights(self.cluster, name)
        assert found, f"{name} has written no weights"
        return found


def build_job(name: str, pod_template: Object) -> Object:
    """One rank on each of two nodes."""
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
            "training": {
                "method": "LoRA",
                "steps": STEPS,
                "batchSize": 4,
                "learningRate": 1e-3,
                "resolution": 64,
                "lora": {"rank": 4},
            },
            "topology": {"accelerator": "cpu", "nodes": 2, "resources": {"cpu": "1", "memory": "1Gi"}},
            "checkpoint": {
                "storage": {"persistentVolumeClaim": {"claimName": CLAIM}},
                "interval": {"steps": SAVE_EVERY},
            },
            "recovery": {"noticeSeconds": 30},
            "outputs": [{"format": "diffusers", "to": f"{MOUNT}/{OUTPUTS}/{name}"}],
            "podTemplate": {"spec": {**template, **pod_template}},
        },
    }
