"""The volume of the jobs: write the model and the data to it, and read the weights back."""

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

from testing.controlplane.build import PrintLine
from testing.realnodes.builder import BASE_PYTHON, ROOT
from testing.realnodes.names import TEAM
from testing.realnodes.runtime import MissingError
from testing.trainer.scripts import PROGRAMS

CLAIM, PACKAGES = "finetune", "packages"
OUTPUTS = "outputs"
SCRIPT = "scripts/train_style.py"
"""Path of the script on the volume."""
WEIGHTS = ("*.safetensors", "*.pt")
"""Trained files of methods, and those of the script."""
USER = 1000
MOUNT = "/finetune/storage"
HASH = (
    f"import hashlib, pathlib, sys; files = sorted(file for kind in {WEIGHTS}"
    " for file in pathlib.Path(sys.argv[1]).rglob(kind));"
    "print(hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest() if files else '')"
)
UNPACK = (
    "import base64, io, sys, tarfile; packed = io.BytesIO(base64.b64decode(sys.stdin.read()));"
    "tarfile.open(fileobj=packed).extractall(sys.argv[1])"
)

Object = dict[str, Any]


class KubectlCluster(Protocol):
    """A cluster with kubectl."""

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 60.0) -> str:
        """Run kubectl and return its output."""


class Store(Protocol):
    """A volume that all pods of a job mount."""

    @property
    def pod_template(self) -> Object:
        """Return additional fields for the pod template of the job."""

    def prepare(self, cluster: KubectlCluster) -> None:
        """Create the claim and write the model and the data to it."""

    def weights(self, cluster: KubectlCluster, job: str) -> str:
        """Return a hash of the files that a job trained; empty if there are none."""


def apply(cluster: KubectlCluster, thing: Object) -> None:
    cluster.kubectl("apply", "--server-side", "--filename=-", stdin=json.dumps(thing))


def ensure_packages(print_line: PrintLine) -> None:
    """Compile the modules that pods import from the environment of the tests, which they mount read-only.

    Raise MissingError if that environment has another Python version than the pods.
    """
    if sys.version_info[:2] != BASE_PYTHON:
        ours, theirs = (".".join(map(str, version)) for version in (sys.version_info[:2], BASE_PYTHON))
        raise MissingError(
            f"the light trainer image uses torch of this environment, which has Python {ours}; the image has {theirs}."
            f" Create the environment with PYTHON=python{theirs}, or use --trainer-image"
        )
    print_line("compiling the modules that the trainer imports")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", "from finetune_trainer import libraries; libraries.preload()"]
    subprocess.run(command, env=environment, check=True)


@dataclass
class FolderVolume:
    """A folder of this machine that all its nodes can mount; torch comes from the test environment."""

    folder: Path
    mounts_packages: bool
    """The trainer image lacks torch, so pods mount the packages of the test environment."""

    @property
    def pod_template(self) -> Object:
        if not self.mounts_packages:
            return {}
        container = {
            "name": "trainer",
            "env": [{"name": "PYTHONPATH", "value": "/packages"}, {"name": "OMP_NUM_THREADS", "value": "1"}],
            "volumeMounts": [{"name": PACKAGES, "mountPath": "/packages", "readOnly": True}],
        }
        packages = {"name": PACKAGES, "persistentVolumeClaim": {"claimName": PACKAGES, "readOnly": True}}
        return {"containers": [container], "volumes": [packages]}

    def prepare(self, cluster: KubectlCluster) -> None:
        self.folder.mkdir(parents=True)
        write_inputs(self.folder)
        for path in (self.folder, *self.folder.rglob("*")):
            os.chown(path, USER, USER)
        folders = {CLAIM: self.folder}
        if self.mounts_packages:
            folders[PACKAGES] = Path(sysconfig.get_path("platlib"))
        for name, folder in folders.items():
            apply(cluster, volume(name, folder))
            apply(cluster, claim(name, storage_class="", volume_name=name))

    def weights(self, cluster: KubectlCluster, job: str) -> str:
        files = sorted(file for kind in WEIGHTS for file in (self.folder / OUTPUTS / job).rglob(kind))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else ""


@dataclass
class ClaimStore:
    """A claim on the cluster of the user, with a class that several nodes can write to. A pod transfers the files."""

    image: str
    storage_class: str | None
    work: Path

    @property
    def pod_template(self) -> Object:
        return {}

    def prepare(self, cluster: KubectlCluster) -> None:
        apply(cluster, claim(CLAIM, storage_class=self.storage_class))
        self._start_carrier(cluster)
        write_inputs(self.work)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name in ("base", "data", "scripts"):
                archive.add(self.work / name, name)
        # kubectl takes text on standard input, so the archive is encoded as base64.
        text = base64.b64encode(packed.getvalue()).decode()
        self._run(cluster, "-i", "carrier", "--", "python", "-c", UNPACK, MOUNT, stdin=text)

    def weights(self, cluster: KubectlCluster, job: str) -> str:
        # A drain of its node may have deleted the pod.
        self._start_carrier(cluster)
        return self._run(cluster, "carrier", "--", "python", "-c", HASH, f"{MOUNT}/{OUTPUTS}/{job}").strip()

    def _start_carrier(self, cluster: KubectlCluster) -> None:
        apply(cluster, carrier(self.image))
        waiting = ("wait", "--for=condition=Ready", "pod/carrier", "--timeout=300s")
        cluster.kubectl("--namespace", TEAM, *waiting, timeout_seconds=310)

    @staticmethod
    def _run(cluster: KubectlCluster, *arguments: str, stdin: str | None = None) -> str:
        return cluster.kubectl("--namespace", TEAM, "exec", *arguments, stdin=stdin, timeout_seconds=300)


def write_inputs(folder: Path) -> None:
    """Write the model and the data of the demo, and the script, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ("-m", "finetune_trainer.demo.circles", str(folder / "data"), "--style", "squares")
    counts = ("--num-train", "64", "--num-validation", "8")
    subprocess.run([sys.executable, *command, *counts], check=True, capture_output=True)
    shutil.copytree(ROOT / "examples/base-circles", folder / "base")
    script = folder / SCRIPT
    script.parent.mkdir()
    shutil.copyfile(PROGRAMS / script.name, script)


def volume(name: str, folder: Path, storage_class: str = "", size: str = "10Gi") -> Object:
    """Return a volume for a folder that all nodes can mount, like NFS: for one claim, or for any claim of a class."""
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
    """Return a claim; without a class it uses the default class of the cluster."""
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
    """Return a pod that mounts the claim and waits. It has the same security settings as the pods of jobs."""
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
