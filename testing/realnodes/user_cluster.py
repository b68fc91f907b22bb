"""A cluster of the user, selected by KUBECONFIG: the checks that need no access to its machines.

Needs FINETUNE_OPERATOR_IMAGE and FINETUNE_TRAINER_IMAGE (name:tag that its nodes can pull), and a storage class
that several nodes can write to: the default one, or FINETUNE_STORAGE_CLASS. All objects are created in separate
namespaces and removed at the end; the next run removes what a killed run left. Nodes are drained and tainted, so the
cluster must have no other users.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testing.controlplane.build import PrintLine
from testing.controlplane.server import KubectlError
from testing.realnodes.names import CLUSTER_KINDS, CRD, FAULT_TAINT, HOME, OF_CHART, OURS, TEAM

REMOVAL_SECONDS = 240.0


class RefusedError(RuntimeError):
    """The cluster or its settings are unsuitable; the message gives the reason and the remedy."""


@dataclass(frozen=True)
class UserCluster:
    """kubectl with the kubeconfig of the user."""

    program: Path
    kubeconfig: Path

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 60.0) -> str:
        """Run kubectl and return its output. Raise KubectlError if it fails."""
        result = subprocess.run(
            [str(self.program), *arguments],
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        if result.returncode != 0:
            raise KubectlError(arguments, result.returncode, result.stderr)
        return result.stdout

    def prepare(self, print_line: PrintLine) -> None:
        """Remove what an earlier run left. Raise RefusedError if conflicting objects of others exist."""
        try:
            self.kubectl("get", "namespaces", "--output=name", timeout_seconds=20)
        except (KubectlError, subprocess.TimeoutExpired) as error:
            raise RefusedError(
                f"KUBECONFIG: set it to a kubeconfig with administrator access to a reachable cluster: {error}"
            ) from None
        if foreign := list(self._foreign()):
            raise RefusedError(
                f"{', '.join(foreign)}: these exist in the cluster, and this test did not create them."
                " Uninstall the operator there (deleting the CRD also removes its jobs), or use another cluster"
            )
        self.remove_all(print_line)

    def remove_all(self, print_line: PrintLine) -> None:
        """Remove the leftovers of a run; return when they are deleted."""
        if not (leftovers := self._find_leftovers()):
            return
        print_line(f"removing {', '.join(leftovers)}")
        for node in self._names("nodes", f"--selector={OURS}"):
            self.kubectl("uncordon", node)
            self.kubectl("label", node, f"{OURS}-")
        for node in self._tainted():
            self.kubectl("taint", "node", node.removeprefix("node/"), f"{FAULT_TAINT}-")
        self.kubectl("delete", CLUSTER_KINDS, f"--selector={OF_CHART}")
        ours = self._names(f"namespace/{HOME}", f"namespace/{TEAM}", CRD)
        if ours:
            self.kubectl("delete", *ours, f"--timeout={REMOVAL_SECONDS:.0f}s", timeout_seconds=REMOVAL_SECONDS + 20)

    def _find_leftovers(self) -> list[str]:
        found = self._names(f"namespace/{HOME}", f"namespace/{TEAM}", CRD)
        found += self._names(CLUSTER_KINDS, f"--selector={OF_CHART}")
        return [*found, *self._names("nodes", f"--selector={OURS}"), *self._tainted()]

    def _names(self, *what: str) -> list[str]:
        return self.kubectl("get", *what, "--ignore-not-found", "--output=name").split()

    def _tainted(self) -> list[str]:
        nodes = json.loads(self.kubectl("get", "nodes", "--output=json"))["items"]
        return [
            f"node/{node['metadata']['name']}"
            for node in nodes
            if any(taint["key"] == FAULT_TAINT for taint in node["spec"].get("taints", []))
        ]

    def _foreign(self) -> Iterator[str]:
        """Yield objects with the names of this test that it did not create."""
        for thing in (f"namespace/{HOME}", f"namespace/{TEAM}", CRD):
            found = self.kubectl("get", thing, "--ignore-not-found", "--output=json")
            if not found.strip():
                continue
            metadata = json.loads(found)["metadata"]
            release = metadata.get("annotations", {}).get("meta.helm.sh/release-namespace")
            if OURS not in metadata.get("labels", {}) and release != HOME:
                yield thing


def image_from(variable: str) -> str:
    """Return the image that the user pushed, from an environment variable."""
    image = os.environ.get(variable, "")
    if ":" not in image.rpartition("/")[2]:
        raise RefusedError(
            f"{variable}: set it to name:tag of an image that the nodes can pull (make image-operator, ...)"
        )
    return image
