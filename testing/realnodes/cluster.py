"""Real nodes on this machine: the control plane of the tests, CoreDNS, and kubelets in their own namespaces.

Called by `__main__` inside its own network namespace (`enter_own_network`), so that nothing listens on an address of
the machine, and nothing remains when the process ends.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from testing.controlplane import commands
from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.build import PrintLine
from testing.controlplane.process import Program, wait_for
from testing.controlplane.server import API_SERVER_HOSTS, ControlPlane
from testing.realnodes.layers import ensure_layers
from testing.realnodes.node import GATEWAY, NodeLayout, RealNode, ip
from testing.realnodes.programs import ensure_all
from testing.realnodes.runtime import ensure_runtime

CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000
GRACE = "4s"
"""Time without a heartbeat after which a node is not ready."""
READY_SECONDS = 120.0
COREFILE = """\
cluster.local:53 {{
    bind {address}
    errors
    kubernetes cluster.local {{
        kubeconfig {kubeconfig}
        ttl 1
    }}
}}
.:53 {{
    bind {address}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""


def enter_own_network() -> None:
    """Move this process to a new network namespace that contains only a bridge."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare of the network namespace")
    ip("link", "set", "lo", "up")
    ip("link", "add", "bridge0", "type", "bridge")
    ip("address", "add", f"{GATEWAY}/24", "dev", "bridge0")
    ip("link", "set", "bridge0", "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


class RealCluster(ControlPlane):
    """A control plane that kubelets can reach, and its nodes."""

    def __init__(self, num_nodes: int, folder: Path, images: Path, print_line: PrintLine) -> None:
        """Prepare a cluster. `images` is the folder with the archives that every node loads."""
        super().__init__({"kube-controller-manager", "kube-scheduler"}, folder=folder, toleration_seconds=1)
        self._num_nodes = num_nodes
        self._images = images
        self._print_line = print_line
        self.nodes: list[RealNode] = []

    @property
    def api_port(self) -> int:
        """Port of the API server."""
        return self._layout.api_port

    def start_nodes(self) -> None:
        """Start CoreDNS and the nodes; return when all are ready."""
        assert self._guard is not None
        self._start_dns()
        self.nodes = [RealNode(self._node_layout(number), self._guard) for number in range(1, self._num_nodes + 1)]
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            self.wait_ready(node.name)

    def wait_ready(self, name: str, ready: bool = True) -> None:
        """Wait until a node is ready, or until it is not."""
        wait_for(f"{name} is {'' if ready else 'not '}ready", lambda: self.is_ready(name) is ready, READY_SECONDS)

    def is_ready(self, name: str) -> bool:
        """Return whether the condition Ready of the node is true."""
        try:
            node = self.api.get(f"/api/v1/nodes/{name}")
        except ControlPlaneApiError:
            return False
        conditions = {one["type"]: one["status"] for one in node.get("status", {}).get("conditions", [])}
        return conditions.get("Ready") == "True"

    def _prepare(self) -> None:
        self._real = ensure_all(self._print_line)
        self._runtime = ensure_runtime(self._print_line)
        self._layers = ensure_layers(self._images, self._runtime, self._print_line)
        super()._prepare()
        server = self.authority.issue("kube-apiserver-nodes", hosts=(*API_SERVER_HOSTS, GATEWAY))
        client = self.authority.issue("kube-apiserver-kubelet-client", groups=["system:masters"])
        self._commands["kube-apiserver"] += [
            # Listen on all addresses: only this process uses the network namespace.
            "--bind-address=0.0.0.0",
            f"--advertise-address={GATEWAY}",
            "--endpoint-reconciler-type=master-count",
            f"--tls-cert-file={server.certificate}",
            f"--tls-private-key-file={server.key}",
            f"--kubelet-client-certificate={client.certificate}",
            f"--kubelet-client-key={client.key}",
            f"--kubelet-certificate-authority={self.authority.certificate}",
            "--kubelet-preferred-address-types=InternalIP",
            "--allow-privileged=true",
        ]
        self._commands["kube-controller-manager"].append(f"--node-monitor-grace-period={GRACE}")

    def _start_dns(self) -> None:
        assert self._guard is not None
        file = self.folder / "Corefile"
        file.write_text(COREFILE.format(address=GATEWAY, kubeconfig=self._user("coredns", ["system:masters"])))
        command = [str(self._real["coredns"]), "-conf", str(file)]
        self._programs["coredns"] = Program("coredns", command, self._layout.log("coredns"), self._guard)
        self._programs["coredns"].start()

    def _node_layout(self, number: int) -> NodeLayout:
        name = f"node{number}"
        address = f"10.77.0.{10 + number}"
        return NodeLayout(
            number=number,
            folder=self.folder / name,
            logs=self.folder / "logs",
            layers=self._layers,
            kubeconfig=self._user(f"system:node:{name}", ["system:nodes"]),
            proxy_kubeconfig=self._user("system:kube-proxy", []),
            authority=self.authority.certificate,
            certificate=self.authority.issue(f"serving-{name}", hosts=(name, address)),
            programs=self._real,
            runtime=self._runtime,
        )

    def _user(self, user: str, groups: list[str]) -> Path:
        """Return the kubeconfig of a client that connects over the bridge."""
        client: dict[str, Any] = commands.certificate_user(self.authority.issue(user, groups=groups))
        path = self._layout.kubeconfig(user.replace(":", "-"))
        url = f"https://{GATEWAY}:{self._layout.api_port}"
        path.touch(mode=0o600)
        path.write_text(commands.kubeconfig(url, self.authority.certificate, client))
        return path
