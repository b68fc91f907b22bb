"""One node: containerd, kubelet and kube-proxy in their own namespaces. It can be killed and started again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testing.controlplane.pki import Certificate
from testing.controlplane.process import Guard, Program, wait_for
from testing.realnodes.cleanup import CGROUPS, cgroup_of
from testing.realnodes.layers import copy_layers
from testing.realnodes.runtime import Runtime

INIT = Path(__file__).with_name("node_init.sh")
GATEWAY = "10.77.0.1"
"""Address of the control plane and of CoreDNS."""
SETUP_SECONDS = 60.0


@dataclass(frozen=True)
class NodeLayout:
    """Folders and programs of a node."""

    number: int
    folder: Path
    logs: Path
    layers: Path
    """Folder of a containerd that has unpacked all images."""
    kubeconfig: Path
    proxy_kubeconfig: Path
    authority: Path
    certificate: Certificate
    programs: dict[str, Path]
    runtime: Runtime

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return f"10.77.0.{10 + self.number}"

    @property
    def pods(self) -> str:
        return f"10.244.{self.number}.0/24"

    @property
    def cgroup(self) -> str:
        return f"{cgroup_of(os.getpid())}/{self.name}"


class RealNode:
    """A node, running or stopped."""

    def __init__(self, layout: NodeLayout, guard: Guard) -> None:
        self.layout = layout
        self._guard = guard
        self._program: Program | None = None

    @property
    def name(self) -> str:
        return self.layout.name

    def start(self) -> None:
        """Start the first process of the node and connect its network. The kubelet registers the node later."""
        layout = self.layout
        # Remove the state of a killed kubelet; images and unpacked layers stay.
        for part in ("kubelet", "log", "etc-cni", "cni"):
            shutil.rmtree(layout.folder / part, ignore_errors=True)
        layout.folder.mkdir(parents=True, exist_ok=True)
        if not (layout.folder / "containerd").exists():
            copy_layers(layout.layers, layout.folder / "containerd")
        self._write_configuration()
        self._make_cgroups()
        namespaces = ("--net", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc")
        environment = [f"{name}={value}" for name, value in self._environment().items()]
        command = ["unshare", *namespaces, "--propagation", "private", "env", *environment, "bash", str(INIT)]
        self._program = Program(layout.name, command, layout.logs / f"{layout.name}.log", self._guard)
        self._program.start()
        child = wait_for(f"{layout.name} has started", self._child, SETUP_SECONDS)
        ip("link", "add", f"wire{layout.number}", "type", "veth", "peer", "name", "eth0", "netns", str(child))
        ip("link", "set", f"wire{layout.number}", "master", "bridge0", "up")
        ip("route", "replace", layout.pods, "via", layout.address)

    def kill(self) -> None:
        """Kill all processes of the node at once with SIGKILL, as if the machine disappeared."""
        assert self._program is not None
        self._program.stop()
        self._program = None
        subprocess.run(["ip", "link", "delete", f"wire{self.layout.number}"], capture_output=True, check=False)

    def inside(self, *command: str) -> str:
        """Run a command in the namespaces of the node."""
        enter = ("nsenter", "--target", str(self._child()), "--net", "--pid", "--mount")
        return subprocess.run([*enter, *command], capture_output=True, text=True, check=True).stdout

    def _child(self) -> int:
        """Return the first process of the namespaces."""
        pid = self._program.pid if self._program is not None else None
        if pid is None:
            return 0
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def _environment(self) -> dict[str, str | Path]:
        layout = self.layout
        return {
            "NODE": layout.name,
            "FOLDER": layout.folder,
            "LOGS": layout.logs,
            "ADDRESS": layout.address,
            "GATEWAY": GATEWAY,
            "PODS": layout.pods,
            "KUBECONFIG": layout.kubeconfig,
            "KUBELET": layout.programs["kubelet"],
            "KUBE_PROXY": layout.programs["kube-proxy"],
            "CONTAINERD": layout.runtime.containerd,
            "CTR": layout.runtime.ctr,
            "SHIMS": layout.runtime.shims,
        }

    def _make_cgroups(self) -> None:
        for hierarchy in CGROUPS.iterdir():
            if not hierarchy.is_dir() or hierarchy.is_symlink():
                continue
            folder = hierarchy
            for part in Path(self.layout.cgroup).parts:
                parent, folder = folder, folder / part
                folder.mkdir(exist_ok=True)
                # A cpuset accepts processes only after it has cores and memory.
                for name in ("cpuset.cpus", "cpuset.mems"):
                    if (folder / name).exists() and not (folder / name).read_text().strip():
                        (folder / name).write_text((parent / name).read_text())

    def _write_configuration(self) -> None:
        layout = self.layout
        (layout.folder / "kubelet.json").write_text(json.dumps(kubelet_configuration(layout)))
        (layout.folder / "proxy.json").write_text(json.dumps(proxy_configuration(layout)))
        (layout.folder / "containerd.toml").write_text(containerd_configuration(layout))


def kubelet_configuration(layout: NodeLayout) -> dict[str, Any]:
    """Return a configuration that reports quickly and does not evict for disk pressure: nodes share a disk."""
    nothing_left = dict.fromkeys(("nodefs.available", "imagefs.available", "nodefs.inodesFree"), "0%")
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{layout.cgroup}",
        "enforceNodeAllocatable": ["pods"],
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "address": layout.address,
        "clusterDNS": [GATEWAY],
        "clusterDomain": "cluster.local",
        "resolvConf": str(layout.folder / "resolv.conf"),
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(layout.authority)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(layout.certificate.certificate),
        "tlsPrivateKeyFile": str(layout.certificate.key),
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {**nothing_left, "memory.available": "50Mi"},
        "nodeStatusUpdateFrequency": "2s",
        "nodeLeaseDurationSeconds": 8,
        "syncFrequency": "10s",
    }


def proxy_configuration(layout: NodeLayout) -> dict[str, Any]:
    """Return a configuration that uses iptables and does not change the connection tracking settings of the machine."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clientConnection": {"kubeconfig": str(layout.proxy_kubeconfig)},
        "hostnameOverride": layout.name,
        "clusterCIDR": "10.244.0.0/16",
        "bindAddress": "127.0.0.1",
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "iptables": {"minSyncPeriod": "0s"},
    }


def containerd_configuration(layout: NodeLayout) -> str:
    """Return a configuration of the CRI plugin with runc. It never lowers an OOM score, which some machines refuse."""
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[{cri}]
  restrict_oom_score_adj = true
  sandbox_image = "localhost/pause:test"
  [{cri}.cni]
    bin_dir = "{layout.runtime.cni}"
    conf_dir = "/etc/cni/net.d"
  [{cri}.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [{cri}.containerd.runtimes.runc.options]
      BinaryName = "{layout.runtime.runc}"
      SystemdCgroup = false
"""


def ip(*arguments: str) -> None:
    """Run `ip` in the network namespace of this process."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
