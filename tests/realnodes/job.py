"""The job that the faults happen to: the demo's model on two nodes with one rank each, over gloo."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finetune_operator.api.job import API_VERSION, KIND
from tests.controlplane.process import wait_for
from tests.realnodes.builder import ROOT

TEAM = "team-a"
CLAIM, PACKAGES = "finetune", "packages"
STEPS, SAVE_EVERY, FAULT_STEP = 60, 20, 26
USER = 1000
RUN_SECONDS = 300.0
OUTPUTS = "outputs"


class Cluster(Protocol):
    """What is asked of a cluster: kubectl."""

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 60.0) -> str:
        """What it prints."""


@dataclass
class Bed:
    """The namespace of the jobs, and the folder behind their claim."""

    cluster: Cluster
    shared: Path

    def prepare(self) -> None:
        """The model and the data on the volume, the volumes, and a namespace that enforces the restricted standard."""
        data = self.shared / "data"
        self.shared.mkdir(parents=True)
        make = ("-m", "finetune_trainer.demo.circles", str(data), "--style", "squares")
        counts = ("--num-train", "64", "--num-validation", "8")
        subprocess.run([sys.executable, *make, *counts], check=True, capture_output=True)
        shutil.copytree(ROOT / "examples/base-circles", self.shared / "base")
        for path in (self.shared, *self.shared.rglob("*")):
            os.chown(path, USER, USER)
        enforce = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": TEAM, "labels": enforce}})
        packages = Path(sysconfig.get_path("platlib"))
        for name, folder in ((CLAIM, self.shared), (PACKAGES, packages)):
            self.apply(volume(name, folder))
            self.apply(claim(name))

    def apply(self, thing: dict[str, Any]) -> None:
        self.cluster.kubectl("apply", "--server-side", "--filename=-", stdin=json.dumps(thing))

    def create(self, name: str) -> None:
        self.apply(build_job(name))

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
        folder = self.shared / OUTPUTS / name
        files = sorted(folder.rglob("*.safetensors"))
        assert files, f"no weights below {folder}"
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def build_job(name: str) -> dict[str, Any]:
    """One rank on each of two nodes."""
    apart = {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {"finetune-operator.io/job": name}},
    }
    container = {
        "name": "trainer",
        "env": [{"name": "PYTHONPATH", "value": "/packages"}, {"name": "OMP_NUM_THREADS", "value": "1"}],
        "volumeMounts": [{"name": PACKAGES, "mountPath": "/packages", "readOnly": True}],
    }
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": TEAM},
        "spec": {
            "model": {"base": "/finetune/storage/base"},
            "dataset": {"source": "/finetune/storage/data"},
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
            "outputs": [{"format": "diffusers", "to": f"/finetune/storage/{OUTPUTS}/{name}"}],
            "podTemplate": {
                "spec": {
                    "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}},
                    "containers": [container],
                    "volumes": [{"name": PACKAGES, "persistentVolumeClaim": {"claimName": PACKAGES, "readOnly": True}}],
                }
            },
        },
    }


def volume(name: str, folder: Path) -> dict[str, Any]:
    """A folder that all nodes see, as NFS is."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "10Gi"},
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "claimRef": {"name": name, "namespace": TEAM},
            "hostPath": {"path": str(folder)},
        },
    }


def claim(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": TEAM},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "volumeName": name,
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
