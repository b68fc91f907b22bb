"""Kueue's real controller on a control plane, with its CRDs and its webhooks for Workloads and queues.

Called by the tests and benches of queues. Kueue is not a part of every control plane: its first build takes about ten
minutes on two cores (`build.KUEUE`).

The API server reaches the webhooks of a program on the loopback interface through a Service of type ExternalName.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.build import KUEUE, ensure_programs
from testing.controlplane.process import LOOPBACK, Guard, Program, free_ports, wait_for
from testing.controlplane.server import ControlPlane

NAMESPACE = "kueue-system"
SERVICE = "kueue-webhook-service"
SECRET = "kueue-webhook-server-cert"
GROUP = "kueue.x-k8s.io"
ROOT = f"/apis/{GROUP}/v1beta2"
READY_SECONDS = 120.0
WITHOUT_AUTHORITY = frozenset({"resourceflavors"})
"""CRDs into which Kueue does not write the certificate authority of its conversion webhook.

With the webhook, the API server would try again and again to convert these objects for the cache of the older version.
Their versions have the same fields, so they need no conversion.
"""
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
WEBHOOKS = "/apis/admissionregistration.k8s.io/v1"
FRAMEWORK = "FineTuneJob.v1alpha1.finetune-operator.io"


class Kueue:
    """Kueue's controller. Use it as a context manager; it ends with its control plane at the latest."""

    def __init__(
        self,
        control_plane: ControlPlane,
        *,
        features: Sequence[str] = (),
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare the controller without starting it.

        control_plane: a running control plane.
        features: feature gates to enable.
        configuration: further fields of Kueue's configuration.
        """
        self._control_plane = control_plane
        self._api = control_plane.api
        self._features = features
        self._extra = dict(configuration or {})
        self._guard: Guard | None = None
        self._program: Program | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Install the CRDs and the webhooks, start the controller and wait until it decides."""
        program = ensure_programs(modules=(KUEUE,))["kueue"]
        manifests = program.parents[1] / "manifests"
        folder = self._control_plane.folder / "kueue"
        folder.mkdir(exist_ok=True)
        webhook_port, probe_port, metrics_port, visibility_port = free_ports(4)
        self._install(manifests, webhook_port)
        config = folder / "config.json"
        config.write_text(json.dumps(self._configuration(webhook_port, probe_port, metrics_port, visibility_port)))
        command = [
            str(program),
            f"--config={config}",
            f"--kubeconfig={self._control_plane.kubeconfig}",
            "--zap-log-level=2",
        ]
        if self._features:
            command.append(f"--feature-gates={','.join(f'{name}=true' for name in self._features)}")
        self._guard = Guard()
        self._program = Program("kueue", command, self._control_plane.folder / "logs" / "kueue.log", self._guard)
        self._program.start()
        wait_for("Kueue decides", self._is_ready, READY_SECONDS)
        return self

    def stop(self) -> None:
        """Stop the controller; its objects stay."""
        if self._program is not None:
            self._program.stop()
        if self._guard is not None:
            self._guard.close()
            self._guard = None

    @property
    def program(self) -> Program:
        """The process, for a test that stops or restarts it."""
        assert self._program is not None
        return self._program

    def log(self) -> str:
        """Return the controller's log."""
        return self.program.log.read_text(errors="replace")

    # --- objects -----------------------------------------------------------------------------------------------------

    def apply(self, plural: str, name: str, spec: Mapping[str, Any], *, namespace: str = "") -> None:
        """Create or change a flavor, a queue, a cohort or another object of Kueue."""
        kinds = {
            "resourceflavors": "ResourceFlavor",
            "clusterqueues": "ClusterQueue",
            "localqueues": "LocalQueue",
            "cohorts": "Cohort",
            "workloadpriorityclasses": "WorkloadPriorityClass",
            "admissionchecks": "AdmissionCheck",
            "topologies": "Topology",
        }
        thing: dict[str, Any] = {"apiVersion": f"{GROUP}/v1beta2", "kind": kinds[plural], "metadata": {"name": name}}
        thing |= dict(spec) if plural == "workloadpriorityclasses" else {"spec": dict(spec)}
        root = f"{ROOT}/namespaces/{namespace}" if namespace else ROOT
        self._api.patch(f"{root}/{plural}/{name}?fieldManager=test&force=true", thing, "apply")

    def add_queue(
        self,
        name: str,
        namespace: str,
        flavors: Sequence[Mapping[str, Any]],
        *,
        cohort: str = "",
        preemption: Mapping[str, Any] | None = None,
        covered: Sequence[str] = ("cpu", "memory"),
        **spec: Any,
    ) -> None:
        """Create or change a ClusterQueue, and the LocalQueue of the same name that points to it.

        flavors: name, and the nominal quota of each covered resource; `borrowing` limits what it may borrow.
        """
        groups = [
            {"name": flavor["name"], "resources": [_quota(flavor, resource) for resource in covered]}
            for flavor in flavors
        ]
        queue: dict[str, Any] = {
            "namespaceSelector": {},
            "queueingStrategy": "BestEffortFIFO",
            "resourceGroups": [{"coveredResources": list(covered), "flavors": groups}],
            **spec,
        }
        if cohort:
            queue["cohortName"] = cohort
        if preemption:
            queue["preemption"] = dict(preemption)
        self.apply("clusterqueues", name, queue)
        self.apply("localqueues", name, {"clusterQueue": name}, namespace=namespace)

    def workloads(self, namespace: str) -> dict[str, dict[str, Any]]:
        """Return the Workloads of a namespace by name."""
        items = self._api.get(f"{ROOT}/namespaces/{namespace}/workloads")["items"]
        return {item["metadata"]["name"]: item for item in items}

    # --- installation ------------------------------------------------------------------------------------------------

    def _install(self, manifests: Path, webhook_port: int) -> None:
        for file in sorted((manifests / "crd" / "bases").glob("*.yaml")):
            definition = yaml.safe_load(file.read_text())
            plural = definition["spec"]["names"]["plural"]
            has_webhook = (manifests / "crd" / "patches" / f"webhook_in_{plural}.yaml").exists()
            if has_webhook and plural not in WITHOUT_AUTHORITY:
                definition["spec"]["conversion"] = _conversion(webhook_port)
            self._apply(f"{CRDS}/{definition['metadata']['name']}", definition)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        self._apply(f"/api/v1/namespaces/{NAMESPACE}", namespace)
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": SERVICE},
            "spec": {"type": "ExternalName", "externalName": "localhost"},
        }
        self._apply(f"/api/v1/namespaces/{NAMESPACE}/services/{SERVICE}", service)
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}}
        self._apply(f"/api/v1/namespaces/{NAMESPACE}/secrets/{SECRET}", secret)
        for webhooks in yaml.safe_load_all((manifests / "webhook" / "manifests.yaml").read_text()):
            self._apply_webhooks(webhooks, webhook_port)

    def _apply_webhooks(self, configuration: dict[str, Any], port: int) -> None:
        """Install the webhooks of Kueue's own objects; those of other kinds of jobs are not tested here."""
        configuration["metadata"]["name"] = f"kueue-{configuration['metadata']['name']}"
        configuration["webhooks"] = [hook for hook in configuration["webhooks"] if _is_own(hook)]
        for hook in configuration["webhooks"]:
            hook["clientConfig"]["service"] |= {"name": SERVICE, "namespace": NAMESPACE, "port": port}
        plural = f"{configuration['kind'].lower()}s"
        self._apply(f"{WEBHOOKS}/{plural}/{configuration['metadata']['name']}", configuration)

    def _apply(self, path: str, thing: dict[str, Any]) -> None:
        self._api.patch(f"{path}?fieldManager=test&force=true", thing, "apply")

    def _configuration(
        self, webhook_port: int, probe_port: int, metrics_port: int, visibility_port: int
    ) -> dict[str, Any]:
        return {
            "apiVersion": "config.kueue.x-k8s.io/v1beta2",
            "kind": "Configuration",
            "namespace": NAMESPACE,
            "health": {"healthProbeBindAddress": f"{LOOPBACK}:{probe_port}"},
            "metrics": {"bindAddress": f"{LOOPBACK}:{metrics_port}"},
            "webhook": {"host": LOOPBACK, "port": webhook_port, "certDir": str(self._certificates)},
            "visibilityServer": {"bindAddress": LOOPBACK, "bindPort": visibility_port},
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {
                "enable": True,
                "webhookServiceName": SERVICE,
                "webhookSecretName": SECRET,
            },
            # Without a limit on requests: the bench is about the operator.
            "clientConnection": {"qps": 500, "burst": 1000},
            "integrations": {"frameworks": ["batch/job"], "externalFrameworks": [FRAMEWORK]},
            **self._extra,
        }

    def _mount_certificates(self) -> None:
        """Write the certificates that the controller has issued into its folder, as a kubelet mounts the Secret."""
        data = self._api.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/{SECRET}").get("data") or {}
        self._certificates.mkdir(exist_ok=True)
        for name, value in data.items():
            file, content = self._certificates / name, base64.b64decode(value)
            if not file.exists() or file.read_bytes() != content:
                # Renamed into place: the controller reads the files at any moment.
                partial = file.with_suffix(".partial")
                partial.write_bytes(content)
                partial.replace(file)

    @property
    def _certificates(self) -> Path:
        return self._control_plane.folder / "kueue" / "certificates"

    def _is_ready(self) -> bool:
        """Return whether the webhooks answer: an invalid flavor is refused by them, in a dry run."""
        assert self._program is not None
        if self._program.has_exited:
            raise RuntimeError("\n".join(self._program.tail()))
        self._mount_certificates()
        probe = {"apiVersion": f"{GROUP}/v1beta2", "kind": "ResourceFlavor", "metadata": {"name": "probe"}, "spec": {}}
        try:
            self._api.create(f"{ROOT}/resourceflavors?dryRun=All", probe)
        except ControlPlaneApiError:
            return False
        return True


def _quota(flavor: Mapping[str, Any], resource: str) -> dict[str, Any]:
    quota = {"name": resource, "nominalQuota": str(flavor[resource])}
    if resource == "cpu" and "borrowing" in flavor:
        quota["borrowingLimit"] = str(flavor["borrowing"])
    return quota


def _conversion(port: int) -> dict[str, Any]:
    """Return the conversion of a CRD with several versions, as the patches of Kueue's manifests write it."""
    service = {"namespace": NAMESPACE, "name": SERVICE, "path": "/convert", "port": port}
    return {
        "strategy": "Webhook",
        "webhook": {"clientConfig": {"service": service}, "conversionReviewVersions": ["v1"]},
    }


def _is_own(hook: Mapping[str, Any]) -> bool:
    return all(GROUP in rule["apiGroups"] for rule in hook["rules"])
