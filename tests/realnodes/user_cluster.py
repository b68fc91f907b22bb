"""A cluster of the user's, by KUBECONFIG: what can be tried there without touching its machines.

Needs FINETUNE_OPERATOR_IMAGE and FINETUNE_TRAINER_IMAGE (name:tag, where its nodes can pull from), and a storage class
that many nodes can write to: the default one, or FINETUNE_STORAGE_CLASS. Everything is made in the namespaces
finetune-system and team-a, and removed in the end. Nodes are drained and tainted: nobody else is to need the cluster.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.chart.helm import HOME
from tests.controlplane.server import KubectlError
from tests.realnodes.run import CRD
from tests.realnodes.runtime import MissingError
from tests.realnodes.store import TEAM

OURS = (f"namespace/{HOME}", f"namespace/{TEAM}", CRD)


@dataclass(frozen=True)
class UserCluster:
    """kubectl with the user's own kubeconfig."""

    program: Path
    kubeconfig: Path

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 60.0) -> str:
        """What it prints; raises KubectlError where it fails."""
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

    def check_nothing_is_there(self) -> None:
        """Raise MissingError where the run would touch, and in the end remove, what somebody else has made."""
        there = self.kubectl("get", *OURS, "--ignore-not-found", "--output=name").split()
        if there:
            raise MissingError(
                f"{', '.join(there)}: already in this cluster; the test makes and removes these: give another cluster"
            )

    def remove_all(self) -> None:
        """Remove what the run made and has not removed itself."""
        self.kubectl("delete", *OURS, "--ignore-not-found", "--wait=false")


def image_from(variable: str) -> str:
    """An image that the user has pushed."""
    image = os.environ.get(variable, "")
    if ":" not in image.rpartition("/")[2]:
        raise MissingError(f"{variable}: give name:tag of an image that the nodes can pull (make image-operator, ...)")
    return image
