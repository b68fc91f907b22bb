"""A cluster of the user's, by KUBECONFIG: what can be tried there without touching its machines.

Needs FINETUNE_OPERATOR_IMAGE and FINETUNE_TRAINER_IMAGE (name:tag, where its nodes can pull from), and a storage class
that many nodes can write to: the default one, or FINETUNE_STORAGE_CLASS. Everything is made in the namespaces
finetune-system and team-a, and removed in the end.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.controlplane.server import KubectlError
from tests.realnodes.runtime import MissingError


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


def image_from(variable: str) -> str:
    """An image that the user has pushed."""
    image = os.environ.get(variable, "")
    if ":" not in image.rpartition("/")[2]:
        raise MissingError(f"{variable}: give name:tag of an image that the nodes can pull (make image-operator, ...)")
    return image
