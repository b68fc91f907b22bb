"""Runs Helm with the chart of the repository and reads the objects that it renders."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[1] / "charts" / "finetune-operator"
RELEASE = "ftj"
HOME = "finetune-system"
NAME = "ftj-finetune-operator"
"""Full name of the release."""
SECONDS = 120

Object = dict[str, Any]
Values = Mapping[str, Any]


class HelmError(RuntimeError):
    """Helm failed. The message is its error output."""


@dataclass(frozen=True)
class Helm:
    """A helm program with its own cache, configuration and data folders."""

    program: Path
    folder: Path
    kubeconfig: Path | None = None

    def run(self, *arguments: str, values: Values | None = None, stdin: str = "") -> str:
        """Run helm and return its output."""
        if values is not None:
            arguments = (*arguments, "--values", "-")
            stdin = json.dumps(values)
        homes = {f"HELM_{name}_HOME": str(self.folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        # Without a kubeconfig, it must not reach any cluster.
        environment = {**os.environ, **homes, "KUBECONFIG": str(self.kubeconfig or self.folder / "none")}
        result = subprocess.run(
            [str(self.program), *arguments],
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if result.returncode != 0:
            raise HelmError(result.stderr)
        return result.stdout

    def render(self, values: Values | None = None, *, crds: bool = False) -> list[Object]:
        """Return the chart's objects, including those of `helm test`."""
        shown = {"crds": {"install": crds}, **(values or {})}
        text = self.run("template", RELEASE, str(CHART), "--namespace", HOME, values=shown)
        return [thing for thing in yaml.safe_load_all(text) if thing]


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    """Return the only object with a kind (and a name)."""
    found = [thing for thing in objects if thing["kind"] == kind and name in ("", thing["metadata"]["name"])]
    assert len(found) == 1, [(thing["kind"], thing["metadata"]["name"]) for thing in found or objects]
    return found[0]


def kinds(objects: list[Object]) -> set[str]:
    return {thing["kind"] for thing in objects}


def operator_args(objects: list[Object]) -> list[str]:
    """Return the command line of the operator."""
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    args: list[str] = container["args"]
    return args
