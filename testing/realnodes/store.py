"""The volume of the jobs: how the model and the data come onto it, and how the weights are read back."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from testing.controlplane.build import Say
from testing.realnodes.builder import BASE_PYTHON, ROOT
from testing.realnodes.names import TEAM
from testing.realnodes.runtime import MissingError

CLAIM, PACKAGES = "finetune", "packages"
OUTPUTS = "outputs"
USER = 1000
MOUNT = "/finetune/storage"
HASH = (
    "import hashlib, pathlib, sys; files = sorted(pathlib.Path(sys.argv[1]).rglob('*.safetensors'));"
    "print(hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest() if files else '')"
)
UNPACK = (
    "import base64, io, sys, tarfile; packed = io.BytesIO(base64.b64decode(sys.stdin.read()));"
    "tarfile.open(fileobj=packed).extractall(sys.argv[1])"
)

Object = dict[str, Any]


class Cluster(Protocol):
    """What is asked of a cluster: kubectl."""

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 60.0) -> str:
        """What it prints."""


class Store(Protocol):
    """A volume that all pods of a job see."""

    @property
    def pod_template(self) -> Object:
        """What pods need besides."""

    def prepare(self, cluster: Cluster) -> None:
        """Make the claim, and put the model and the data on it."""

    def weights(self, cluster: Cluster, job: str) -> str:
        """Hash of what a job trained, file by file; empty where there is nothing."""


def apply(cluster: Cluster, thing: Object) -> None:
    cluster.kubectl("apply", "--server-side", "--filename=-", stdin=json.dumps(thing))


def ensure_packages(say: Say) -> None:
    """Compile what pods import from the environment of the tests: they see it read-only, and would do so each time.

    Raises MissingError where that environment is of another Python than theirs.
    """
    if sys.version_info[:2] != BASE_PYTHON:
        ours, theirs = (".".join(map(str, version)) for version in (sys.version_info[:2], BASE_PYTHON))
        raise MissingError(
            f"the light trainer image takes torch from this environment, which has Python {ours}, not {theirs} as the"
            f" image: make it with PYTHON=python{theirs}, or give --trainer-image"
        )
    say("compiling what the trainer imports")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", "from finetune_trainer import libraries; libraries.preload()"]
    subprocess.run(command, env=environment, check=True)


@dataclass
class FolderStore:
    """A folder of this machine, which every node of it sees; torch comes from the environment of the tests."""

    folder: Path
    lends_packages: bool
    """Whether the trainer's image is without torch, and is lent the one that the tests run with."""

    @property
    def pod_template(self) -> Object:
        if not self.lends_packages:
            return {}
        container = {
            "name": "trainer",
            "env": [{"name": "PYTHONPATH", "value": "/packages"}, {"name": "OMP_NUM_THREADS", "value": "1"}],
            "volumeMounts": [{"name": PACKAGES, "mountPath": "/packages", "readOnly": True}],
        }
        packages = {"name": PACKAGES, "persistentVolumeClaim": {"claimName": PACKAGES, "readOnly": True}}
        return {"containers": [container], "volumes": [packages]}

    def prepare(self, cluster: Cluster) -> None:
        self.folder.mkdir(parents=True)
        fill(self.folder)
        for path in (self.folder, *self.folder.rglob("*")):
            os.chown(path, USER, USER)
        folders = {CLAIM: self.folder}
        if self.lends_packages:
            folders[PACKAGES] = Path(sysconfig.get_path("platlib"))
        for name, folder in folders.items():
            apply(cluster, volume(name, folder))
            apply(cluster, claim(name, storage_class="", volume_name=name))

    def weights(self, cluster: Cluster, job: str) -> str:
        files = sorted((self.folder / OUTPUTS / job).rglob("*.safetensors"))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else ""


@dataclass
class ClaimStore:
    """A claim on a cluster of the user's, by a storage class that many nodes can write to; a pod carries things."""

    image: str
    storage_class: str | None
    work: Path

    @property
    def pod_template(self) -> Object:
        return {}

    def prepare(self, cluster: Cluster) -> None:
        apply(cluster, claim(CLAIM, storage_class=self.storage_class))
        self._make_carrier(cluster)
        fill(self.work)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name in ("base", "data"):
                archive.add(self.work / name, name)
        # kubectl is given text here: the archive travels as base64.
        text = base64.b64encode(packed.getvalue()).decode()
        self._run(cluster, "-i", "carrier", "--", "python", "-c", UNPACK, MOUNT, stdin=text)

    def weights(self, cluster: Cluster, job: str) -> str:
        # A drained node takes it along with the pods of jobs.
        self._make_carrier(cluster)
        return self._run(cluster, "carrier", "--", "python", "-c", HASH, f"{MOUNT}/{OUTPUTS}/{job}").strip()

    def _make_carrier(self, cluster: Cluster) -> None:
        apply(cluster, carrier(self.image))
        waiting = ("wait", "--for=condition=Ready", "pod/carrier", "--timeout=300s")
        cluster.kubectl("--namespace", TEAM, *waiting, timeout_seconds=310)

    @staticmethod
    def _run(cluster: Cluster, *arguments: str, stdin: str | None = None) -> str:
        return cluster.kubectl("--namespace", TEAM, "exec", *arguments, stdin=stdin, timeout_seconds=300)


def fill(folder: Path) -> None:
    """Put the demo's model and data into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    make = ("-m", "finetune_trainer.demo.circles", str(folder / "data"), "--style", "squares")
    counts = ("--num-train", "64", "--num-validation", "8")
    subprocess.run([sys.executable, *make, *counts], check=True, capture_output=True)
    shutil.copytree(ROOT / "examples/base-circles", folder / "base")


def volume(name: str, folder: Path, storage_class: str = "", size: str = "10Gi") -> Object:
    """A folder that all nodes see, as NFS is: for one claim, or for any one of a class."""
    claimed = {} if storage_class else {"claimRef": {"name": name, "namespace": TEAM}}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": size},
            "accessModes": ["ReadWriteMany"],
            "storageClassName": storage_class,
            **claimed,
            "hostPath": {"path": str(folder)},
        },
    }


def claim(name: str, *, storage_class: str | None, volume_name: str = "") -> Object:
    """A claim; without a class by the cluster's default one."""
    spec: Object = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    if storage_class is not None:
        spec["storageClassName"] = storage_class
    if volume_name:
        spec["volumeName"] = volume_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": TEAM},
        "spec": spec,
    }


def carrier(image: str) -> Object:
    """A pod that holds the claim and does nothing, as restricted as those of jobs."""
    container = {
        "name": "carrier",
        "image": image,
        "command": ["python", "-c", "import signal; signal.pause()"],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": CLAIM, "mountPath": MOUNT}],
    }
    security = {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "carrier", "namespace": TEAM},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "securityContext": security,
            "containers": [container],
            "volumes": [{"name": CLAIM, "persistentVolumeClaim": {"claimName": CLAIM}}],
        },
    }
