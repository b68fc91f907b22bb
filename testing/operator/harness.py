"""The operator as a process on the control plane, with exactly the roles that the chart gives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.api import crd
from finetune_operator.api.job import API_VERSION, KIND, PLURAL
from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.process import LOOPBACK, free_ports, wait_for
from testing.controlplane.server import ControlPlane

RULES = Path(__file__).parents[2] / "charts" / "finetune-operator" / "files" / "rules.yaml"
ACCOUNT = "finetune-operator"
HOME = "finetune-system"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
READY_SECONDS = 60.0
STOP_SECONDS = 40.0


def install(control_plane: ControlPlane, *, queues: bool = False, features: Sequence[str] = ()) -> None:
    """Install the CRD, and the operator's namespace, service account and roles. Needed once per control plane.

    queues: also grant what the chart grants if kueue.enabled is true.
    features: keys of rules.yaml with what the chart grants in the namespaces of jobs for other features.
    """
    api = control_plane.api
    with contextlib.suppress(ControlPlaneApiError):
        control_plane.create_namespace(HOME)
    definition = crd.custom_resource_definition()
    api.patch(
        f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd.NAME}?fieldManager=test&force=true",
        definition,
        "apply",
    )
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT}}
    with contextlib.suppress(ControlPlaneApiError):
        api.create(f"/api/v1/namespaces/{HOME}/serviceaccounts", account)
    rules = yaml.safe_load(RULES.read_text())
    of_jobs = rules["jobs"] + (rules["queues"] if queues else [])
    of_jobs += [rule for feature in features for rule in rules[feature]]
    _grant(api, "ClusterRole", RBAC, "finetune-jobs", of_jobs)
    of_cluster = rules["cluster"] + (rules["queueClasses"] if queues else [])
    _grant(api, "ClusterRole", RBAC, "finetune-cluster", of_cluster)
    _grant(api, "Role", f"{RBAC}/namespaces/{HOME}", "finetune-own", rules["own"])
    wait_for("the CRD is served", lambda: _served(control_plane))


@contextlib.contextmanager
def may_taint_nodes(control_plane: ControlPlane) -> Iterator[None]:
    """Within this block the operator has what the chart grants if gpuFaults.taintAfterJobs is set."""
    with granted(control_plane, "taints"):
        yield


@contextlib.contextmanager
def granted(control_plane: ControlPlane, feature: str) -> Iterator[None]:
    """Within this block the operator has what the chart grants for a feature: a key of rules.yaml."""
    name = f"finetune-{feature}"
    _grant(control_plane.api, "ClusterRole", RBAC, name, yaml.safe_load(RULES.read_text())[feature])
    try:
        yield
    finally:
        for plural in ("clusterrolebindings", "clusterroles"):
            control_plane.api.delete(f"{RBAC}/{plural}/{name}")


def _grant(api: Any, kind: str, root: str, name: str, rules: Any) -> None:
    subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": HOME}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}
    version = "rbac.authorization.k8s.io/v1"
    objects: tuple[dict[str, Any], ...] = (
        {"apiVersion": version, "kind": kind, "metadata": {"name": name}, "rules": rules},
        {
            "apiVersion": version,
            "kind": f"{kind}Binding",
            "metadata": {"name": name},
            "roleRef": reference,
            "subjects": [subject],
        },
    )
    for thing in objects:
        plural = f"{thing['kind'].lower()}s"
        api.patch(f"{root}/{plural}/{name}?fieldManager=test&force=true", thing, "apply")


def _served(control_plane: ControlPlane) -> bool:
    try:
        control_plane.api.get(f"/apis/{API_VERSION}/{PLURAL}")
    except ControlPlaneApiError:
        return False
    return True


def build_job(name: str, *, nodes: int = 2, **spec: Any) -> dict[str, Any]:
    """Return a CPU job that needs no volume."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name},
        "spec": {
            "model": {"base": "base"},
            "dataset": {"source": "data"},
            "training": {"method": "LoRA", "steps": 100},
            "topology": {"accelerator": "cpu", "nodes": nodes, "resources": {"cpu": "1", "memory": "1Gi"}},
            "checkpoint": {"storage": {"hostPath": {"path": "/data"}}},
            **spec,
        },
    }


def jobs_path(namespace: str, name: str = "") -> str:
    """Return the API path of the jobs of a namespace, or of one job."""
    path = f"/apis/{API_VERSION}/namespaces/{namespace}/{PLURAL}"
    return f"{path}/{name}" if name else path


@dataclass
class Jobs:
    """The jobs of a namespace and their pods, with an administrator's rights."""

    control_plane: ControlPlane
    namespace: str

    def create(self, job: Mapping[str, Any]) -> dict[str, Any]:
        created: dict[str, Any] = self.control_plane.api.create(jobs_path(self.namespace), dict(job))
        return created

    def get(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.control_plane.api.get(jobs_path(self.namespace, name))
        return found

    def status(self, name: str) -> dict[str, Any]:
        status: dict[str, Any] = self.get(name).get("status", {})
        return status

    def patch(self, name: str, change: dict[str, Any]) -> None:
        self.control_plane.api.patch(jobs_path(self.namespace, name), change)

    def delete(self, name: str) -> None:
        self.control_plane.api.delete(jobs_path(self.namespace, name))

    def pods(self) -> dict[str, dict[str, Any]]:
        items = self.control_plane.api.get(f"/api/v1/namespaces/{self.namespace}/pods")["items"]
        return {pod["metadata"]["name"]: pod for pod in items}

    def delete_pod(self, name: str, grace_seconds: int | None = 0) -> None:
        self.control_plane.api.delete(f"/api/v1/namespaces/{self.namespace}/pods/{name}", grace_seconds)

    def set_pod_status(self, name: str, status: dict[str, Any]) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}/status"
        self.control_plane.api.patch(path, {"status": status}, "strategic")

    def events(self, name: str) -> list[dict[str, Any]]:
        items = self.control_plane.api.get(f"/apis/events.k8s.io/v1/namespaces/{self.namespace}/events")["items"]
        return [event for event in items if event["regarding"].get("name") == name]

    def wait_phase(self, name: str, phase: str, seconds: float = 30.0) -> dict[str, Any]:
        """Wait for a phase and return the status."""

        def status_in_phase() -> dict[str, Any] | None:
            status = self.status(name)
            return status if status.get("phase") == phase else None

        try:
            return wait_for(f"{name} is {phase}", status_in_phase, seconds) or {}
        except TimeoutError as error:
            raise TimeoutError(f"{error}; its status: {self.status(name)}; pods: {sorted(self.pods())}") from None

    def wait_attempt(self, name: str, attempt: int, seconds: float = 30.0) -> dict[str, Any]:
        """Wait until an attempt runs and return the status."""

        def status_of_attempt() -> dict[str, Any] | None:
            status = self.status(name)
            return status if status.get("attempt") == attempt and status.get("phase") == "Running" else None

        return wait_for(f"attempt {attempt} of {name} runs", status_of_attempt, seconds) or {}


@dataclass
class OperatorProcess:
    """One replica of the operator."""

    kubeconfig: Path
    log: Path
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = ("-m", "finetune_operator.server.main")
    probe_port: int = 0
    coordinator_port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> OperatorProcess:
        """Start the process; use `wait_ready` to wait until it leads."""
        self.probe_port, self.coordinator_port = (
            (self.probe_port, self.coordinator_port) if self.probe_port else free_ports(2)
        )
        command = [sys.executable, *self.program, "run", *self._flags()]
        # A killed process leaves its temporary files behind: they are deleted with the folder of its log.
        temporary = self.log.parent / "tmp"
        temporary.mkdir(exist_ok=True)
        environment = {**os.environ, "TMPDIR": str(temporary), **self.environment}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        return self

    def _flags(self) -> list[str]:
        flags = {
            "kubeconfig": self.kubeconfig,
            "lease-namespace": HOME,
            "lease-seconds": 3,
            "probe-host": LOOPBACK,
            "probe-port": self.probe_port,
            "coordinator-host": LOOPBACK,
            "coordinator-port": self.coordinator_port,
            "log-format": "text",
        }
        return [f"--{name}={value}" for name, value in flags.items()] + list(self.flags)

    def wait_ready(self) -> OperatorProcess:
        """Wait until this replica leads."""
        wait_for(f"the operator leads (log: {self.log})", lambda: self.has_exited() or self.leads(), READY_SECONDS)
        assert not self.has_exited(), self.log.read_text()
        return self

    @property
    def identity(self) -> str:
        """The value of the --identity flag."""
        return next(flag.partition("=")[2] for flag in self.flags if flag.startswith("--identity="))

    def leads(self) -> bool:
        return self.metric("finetune_leader") == 1.0

    def has_exited(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def get(self, path: str) -> tuple[int, str]:
        """Return status and text of a path on the probes' port; status 0 if there is no response."""
        try:
            with urllib.request.urlopen(f"http://{LOOPBACK}:{self.probe_port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metrics(self) -> dict[str, float]:
        """Return all samples by name and labels."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if line and not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def metric(self, name: str) -> float:
        return self.metrics().get(name, float("nan"))

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(STOP_SECONDS)
        self.process = None
        return code

    def pause(self) -> None:
        """Send SIGSTOP: the process stops, but time continues."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Send SIGKILL if the process is running."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def running(process: OperatorProcess) -> Iterator[OperatorProcess]:
    """Start an operator, wait until it leads, and kill it at the end."""
    try:
        yield process.start().wait_ready()
    finally:
        process.kill()
