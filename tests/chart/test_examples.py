"""A real API server with the CRD of the chart accepts every manifest in examples/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from testing.controlplane.definitions import await_established
from testing.controlplane.server import ControlPlane, KubectlError
from testing.helm import CHART, HOME, RELEASE, Helm

FOLDER = Path(__file__).parents[2] / "examples"
LOCAL = sorted((FOLDER / "local").glob("*.yaml"))
"""Examples for `finetune run`. `kubectl apply -f examples/` reads no subfolders."""
EXAMPLES = sorted(FOLDER.glob("*.yaml")) + LOCAL


@pytest.fixture(scope="module")
def installed(helm: Helm, control_plane: ControlPlane) -> Iterator[ControlPlane]:
    """Install the chart for its CRD. Its pods never start, because the cluster has no nodes."""
    admin = Helm(helm.program, helm.folder, control_plane.kubeconfig)
    admin.run("upgrade", "--install", RELEASE, str(CHART), "--namespace", HOME, values={})
    await_established(control_plane, "finetunejobs.finetune-operator.io")
    yield control_plane
    admin.run("uninstall", RELEASE, "--namespace", HOME, "--wait")


def jobs_in(path: Path) -> list[dict[str, Any]]:
    """Return the jobs of a manifest; there is at least one."""
    jobs = [thing for thing in yaml.safe_load_all(path.read_text()) if thing["kind"] == "FineTuneJob"]
    assert jobs, f"{path.name} contains no FineTuneJob"
    return jobs


def dry_run(control_plane: ControlPlane, text: str) -> str:
    arguments = ("apply", "--dry-run=server", "--validate=strict", "--output=name", "--filename=-")
    return control_plane.kubectl(*arguments, stdin=text)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_accepted(installed: ControlPlane, path: Path) -> None:
    """An unknown field is refused, so the check reads the schema."""
    assert "finetunejob.finetune-operator.io/" in dry_run(installed, path.read_text())
    for job in jobs_in(path):
        job["spec"]["training"]["unknownField"] = 1
        with pytest.raises(KubectlError, match="unknownField"):
            dry_run(installed, yaml.safe_dump(job))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_needs_no_other_objects(path: Path) -> None:
    """It runs without changes: it contains its claims. Only a queue is its administrator's."""
    objects = yaml.safe_load_all(path.read_text())
    claims = {thing["metadata"]["name"] for thing in objects if thing["kind"] == "PersistentVolumeClaim"}
    for spec in (job["spec"] for job in jobs_in(path)):
        assert not {"secrets", "priorityClassName"} & set(spec)
        assert spec.get("queueName") == EXPECTED[path.stem].get("queue")
        storage = spec["checkpoint"].get("storage", {})
        bases = [] if "image" in spec["model"] else [spec["model"]["base"]]
        is_local = any(place.startswith((".", "/")) for place in (spec["dataset"]["source"], *bases))
        assert is_local == (path in LOCAL), "a job with files of this machine cannot run on a cluster"
        if is_local:
            assert not storage, "it needs no claim"
            assert (path.parent / spec["model"]["base"]).is_dir()
        else:
            assert storage["persistentVolumeClaim"]["claimName"] in claims


EXPECTED: dict[str, dict[str, Any]] = {
    "lora-sd15-one-gpu": {"method": "LoRA", "accelerator": "gpu", "nodes": 1, "spot": True},
    "controlnet-sdxl-8-gpus-efs": {
        "method": "ControlNet",
        "accelerator": "gpu",
        "ranks": 8,
        "spot": True,
        "class": "efs-sc",
    },
    "lora-sdxl-nccl-4-nodes": {"accelerator": "gpu", "nodes": 4, "ranks": 32},
    "textual-inversion-4-cpu-nodes": {"method": "TextualInversion", "accelerator": "cpu", "nodes": 4},
    "elastic-2-to-8-nodes": {"minNodes": 2, "maxNodes": 8},
    "dreambooth-prior-preservation": {"method": "DreamBooth", "prior": True},
    "lora-sdxl-image-and-claim": {
        "method": "LoRA",
        "ranks": 4,
        "image": True,
        "gpuClaimTemplateName": "two-gpus",
        "pack": "zone",
    },
    "lora-mixed-data": {"method": "LoRA", "accelerator": "gpu", "nodes": 1, "spot": True},
    "queued-elastic-in-a-kueue-queue": {"method": "LoRA", "queue": "team-pictures", "minNodes": 2, "maxNodes": 8},
    "lora-circles": {"method": "LoRA", "accelerator": "cpu"},
}
"""Features that each manifest demonstrates."""


def test_every_example_is_listed_here() -> None:
    assert {path.stem for path in EXAMPLES} == set(EXPECTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_uses_the_features_that_it_demonstrates(path: Path) -> None:
    things = {thing["kind"]: thing["spec"] for thing in yaml.safe_load_all(path.read_text())}
    spec = things["FineTuneJob"]
    training, topology = spec["training"], spec["topology"]
    shown = {
        **topology,
        "method": training["method"],
        "queue": spec.get("queueName"),
        "image": "image" in spec["model"],
        "ranks": topology.get("nodes", 0) * topology.get("processesPerNode", 1),
        "spot": "spot" in spec["recovery"] if "recovery" in spec else False,
        "class": things.get("PersistentVolumeClaim", {}).get("storageClassName"),
        "prior": "classPrompt" in training.get("dreambooth", {}),
    }
    assert EXPECTED[path.stem].items() <= shown.items()
