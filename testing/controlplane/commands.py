"""Command lines and configuration files of the programs: pure functions of a `Layout`.

Called by `server`. Everything listens on the loopback interface, and optional parts are left out: the controller
manager and the scheduler serve nothing, and as there is one of each, they elect no leader.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testing.controlplane.pki import Certificate
from testing.controlplane.process import LOOPBACK

ISSUER = "https://kubernetes.default.svc.cluster.local"
SERVICE_RANGE = "10.96.0.0/16"
# Nothing listens at a pod's address; it only appears in the pod's status.
POD_RANGE = "10.244.0.0/16"
# High enough that the client limits of the controllers never affect a measurement.
CLIENT_QPS = 1000
CLIENT_BURST = 2000
STAGES = Path(__file__).resolve().parent / "stages"


@dataclass(frozen=True)
class Layout:
    """Paths and ports: a folder, the programs and their ports."""

    folder: Path
    programs: dict[str, Path]
    etcd_port: int
    peer_port: int
    api_port: int

    @property
    def etcd_url(self) -> str:
        """URL of etcd."""
        return f"http://{LOOPBACK}:{self.etcd_port}"

    @property
    def api_url(self) -> str:
        """URL of the API server."""
        return f"https://{LOOPBACK}:{self.api_port}"

    @property
    def audit_log(self) -> Path:
        """The API server's audit log: one line of JSON per finished request."""
        return self.folder / "audit.log"

    @property
    def audit_policy(self) -> Path:
        """The API server's audit policy."""
        return self.folder / "audit-policy.json"

    @property
    def scheduler_config(self) -> Path:
        """The scheduler's configuration file."""
        return self.folder / "scheduler.json"

    def log(self, name: str) -> Path:
        """Log of a program."""
        return self.folder / "logs" / f"{name}.log"

    def kubeconfig(self, user: str) -> Path:
        """Kubeconfig of a user."""
        return self.folder / "kubeconfigs" / user


@dataclass(frozen=True)
class Credentials:
    """Certificates and keys of the control plane."""

    authority: Path
    """Authority that clients of the API server trust, and that the API server trusts for client certificates."""
    authority_key: Path
    api_server: Certificate
    tokens: Certificate
    """Key pair that signs service account tokens."""
    front_proxy_authority: Path
    front_proxy: Certificate
    """Client certificate of the API server for aggregated API servers."""


def etcd_command(layout: Layout) -> list[str]:
    """Return the command of one etcd member, on disk without fsync, because its data is temporary."""
    peer = f"http://{LOOPBACK}:{layout.peer_port}"
    return [
        str(layout.programs["etcd"]),
        f"--data-dir={layout.folder / 'etcd'}",
        "--unsafe-no-fsync",
        f"--listen-client-urls={layout.etcd_url}",
        f"--advertise-client-urls={layout.etcd_url}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--log-level=warn",
    ]


def api_server_command(
    layout: Layout,
    credentials: Credentials,
    toleration_seconds: int,
    *,
    audit: bool,
    features: Sequence[str] = (),
    apis: Sequence[str] = (),
) -> list[str]:
    """Return the command of an API server with RBAC, TokenRequest, TokenReview and front-proxy headers.

    features: feature gates to enable.
    apis: API versions to serve that are not served by default.
    """
    command = [
        str(layout.programs["kube-apiserver"]),
        f"--etcd-servers={layout.etcd_url}",
        f"--bind-address={LOOPBACK}",
        f"--secure-port={layout.api_port}",
        # The endpoints of the service `kubernetes` stay empty, because loopback addresses are not allowed in them.
        "--endpoint-reconciler-type=none",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        f"--tls-cert-file={credentials.api_server.certificate}",
        f"--tls-private-key-file={credentials.api_server.key}",
        f"--client-ca-file={credentials.authority}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--service-account-issuer={ISSUER}",
        f"--service-account-key-file={credentials.tokens.certificate}",
        f"--service-account-signing-key-file={credentials.tokens.key}",
        f"--requestheader-client-ca-file={credentials.front_proxy_authority}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={credentials.front_proxy.certificate}",
        f"--proxy-client-key-file={credentials.front_proxy.key}",
        f"--default-not-ready-toleration-seconds={toleration_seconds}",
        f"--default-unreachable-toleration-seconds={toleration_seconds}",
        "--profiling=false",
    ]
    if features:
        command.append(_gates(features))
    if apis:
        command.append(f"--runtime-config={','.join(f'{name}=true' for name in apis)}")
    if audit:
        command += [f"--audit-policy-file={layout.audit_policy}", f"--audit-log-path={layout.audit_log}"]
    return command


def controller_manager_command(layout: Layout, credentials: Credentials, features: Sequence[str] = ()) -> list[str]:
    """Return the command of all controllers; the node controller checks every second and taints without a delay.

    features: feature gates to enable.
    """
    kubeconfig = layout.kubeconfig("kube-controller-manager")
    command = [
        str(layout.programs["kube-controller-manager"]),
        f"--kubeconfig={kubeconfig}",
        "--secure-port=0",
        "--leader-elect=false",
        "--use-service-account-credentials=true",
        f"--service-account-private-key-file={credentials.tokens.key}",
        f"--root-ca-file={credentials.authority}",
        f"--cluster-signing-cert-file={credentials.authority}",
        f"--cluster-signing-key-file={credentials.authority_key}",
        f"--kube-api-qps={CLIENT_QPS}",
        f"--kube-api-burst={CLIENT_BURST}",
        "--allocate-node-cidrs=false",
        "--node-monitor-period=1s",
        # kwok's nodes send no heartbeats; `nodes.lose` marks a lost node itself.
        "--node-monitor-grace-period=24h",
        f"--node-eviction-rate={CLIENT_QPS}",
        "--profiling=false",
    ]
    return [*command, _gates(features)] if features else command


def scheduler_command(layout: Layout, features: Sequence[str] = ()) -> list[str]:
    """Return the scheduler's command, with these feature gates enabled."""
    command = [
        str(layout.programs["kube-scheduler"]),
        f"--config={layout.scheduler_config}",
        "--secure-port=0",
    ]
    return [*command, _gates(features)] if features else command


def _gates(features: Sequence[str]) -> str:
    return f"--feature-gates={','.join(f'{name}=true' for name in features)}"


def kwok_command(layout: Layout, managed_label: str) -> list[str]:
    """Return the command of kwok, which manages the nodes with a label and their pods."""
    stages = [f"--config={stage}" for stage in sorted(STAGES.glob("*.yaml"))]
    return [
        str(layout.programs["kwok"]),
        f"--kubeconfig={layout.kubeconfig('kwok')}",
        "--manage-all-nodes=false",
        f"--manage-nodes-with-label-selector={managed_label}=true",
        f"--node-ip={LOOPBACK}",
        f"--cidr={POD_RANGE}",
        # With leases, kwok would miss changes of a pod between the creation of its node and of the node's lease.
        "--node-lease-duration-seconds=0",
        *stages,
    ]


def scheduler_configuration(layout: Layout) -> dict[str, Any]:
    """Return the content of the scheduler's configuration file."""
    kubeconfig = str(layout.kubeconfig("kube-scheduler"))
    return {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "clientConnection": {"kubeconfig": kubeconfig, "qps": CLIENT_QPS, "burst": CLIENT_BURST},
        "leaderElection": {"leaderElect": False},
        "enableProfiling": False,
    }


def audit_policy() -> dict[str, Any]:
    """Return a policy that logs the metadata of each request when it is finished."""
    return {
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata"}],
    }


def kubeconfig(server: str, authority: Path, user: dict[str, Any], namespace: str = "default") -> str:
    """Return a kubeconfig, as JSON, which is also YAML."""
    cluster = {"server": server, "certificate-authority-data": in_base64(authority)}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test-bed", "cluster": cluster}],
            "users": [{"name": "user", "user": user}],
            "contexts": [
                {"name": "test-bed", "context": {"cluster": "test-bed", "user": "user", "namespace": namespace}}
            ],
            "current-context": "test-bed",
        },
        indent=2,
    )


def certificate_user(client: Certificate) -> dict[str, Any]:
    """Return the user entry of a kubeconfig for a client certificate."""
    return {"client-certificate-data": in_base64(client.certificate), "client-key-data": in_base64(client.key)}


def in_base64(path: Path) -> str:
    """Return a file's content in base64, as kubeconfigs and webhook configurations contain it."""
    return base64.b64encode(path.read_bytes()).decode()
