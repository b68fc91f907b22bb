"""Builds the programs of real nodes: kubelet and CoreDNS from their Go modules, in addition to the control plane.

Called by `cluster`, and as `python -m testing.realnodes.programs` to build all of them.
"""

from __future__ import annotations

import functools
from pathlib import Path

from testing.controlplane.build import ALL_MODULES, HELM, Module, PrintLine, ensure_programs, print_on_stderr

MODULES = Path(__file__).resolve().parent / "go"
KUBELET = Module(
    name="kubelet",
    requires="k8s.io/kubernetes",
    packages={name: f"k8s.io/kubernetes/cmd/{name}" for name in ("kubelet", "kube-proxy")},
    stamped=("k8s.io/component-base/version.gitVersion", "k8s.io/client-go/pkg/version.gitVersion"),
    root=MODULES,
)
COREDNS = Module(
    name="coredns",
    requires="github.com/coredns/coredns",
    packages={"coredns": "."},
    root=MODULES,
)


def ensure_all(print_line: PrintLine = print_on_stderr) -> dict[str, Path]:
    """Build all programs and return their paths by name. A cold build takes 10 to 20 minutes on two cores."""
    return ensure_programs(print_line, modules=(*ALL_MODULES, HELM, KUBELET, COREDNS))


if __name__ == "__main__":
    for name, path in ensure_all(functools.partial(print, flush=True)).items():
        print(f"{name:24} {path}")
