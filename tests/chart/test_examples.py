"""Every manifest in examples/ is taken by a real API server with the CRD of the chart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from testing.controlplane.server import ControlPlane, KubectlError
from testing.helm import CHART, HOME, RELEASE, Helm

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def installed(helm: Helm, control_plane: ControlPlane) -> Iterator[ControlPlane]:
    """The CRD, by the chart; its pods are never started, for there is no node."""
    admin = Helm(helm.program, helm.folder, control_plane.kubeconfig)
    admin.run("upgrade", "--install", RELEASE, str(CHART), "--namespace", HOME, values={})
    control_plane.kubectl("wait", "--for=condition=Established", "crd/finetunejobs.finetune-operator.io")
    yield control_plane
    admin.run("uninstall", RELEASE, "--namespace", HOME, "--wait")


def dry_run(control_plane: ControlPlane, text: str) -> str:
    arguments = ("apply", "--dry-run=server", "--validate=strict", "--output=name", "--filename=-")
    return control_plane.kubectl(*arguments, stdin=text)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_accepted(installed: ControlPlane, path: Path) -> None:
    text = path.read_text()
    assert "finetunejob.finetune-operator.io/" in dry_run(installed, text)
    for thing in yaml.safe_load_all(text):
        if thing["kind"] != "FineTuneJob":
            continue
        thing["spec"]["training"]["nonsense"] = 1
        with pytest.raises(KubectlError):
            dry_run(installed, yaml.safe_dump(thing))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_brings_what_it_names(path: Path) -> None:
    """It runs as it is: no claim, Secret or queue that somebody else would have to make."""
    things = list(yaml.safe_load_all(path.read_text()))
    claims = {thing["metadata"]["name"] for thing in things if thing["kind"] == "PersistentVolumeClaim"}
    for spec in (thing["spec"] for thing in things if thing["kind"] == "FineTuneJob"):
        assert not {"secrets", "queueName", "priorityClassName"} & set(spec)
        storage = spec["checkpoint"].get("storage", {})
        if spec["dataset"]["source"].startswith("."):
            assert not storage, "a job of this machine"
        else:
            assert storage["persistentVolumeClaim"]["claimName"] in claims


ASKED: dict[str, dict[str, Any]] = {
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
    "lora-circles": {"method": "LoRA", "accelerator": "cpu"},
}
"""What each manifest is there to show."""


def test_there_is_one_for_each_way_to_train() -> None:
    assert {path.stem for path in EXAMPLES} == set(ASKED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_shows_what_it_is_there_for(path: Path) -> None:
    things = {thing["kind"]: thing["spec"] for thing in yaml.safe_load_all(path.read_text())}
    spec = things["FineTuneJob"]
    training, topology = spec["training"], spec["topology"]
    shown = {
        **topology,
        "method": training["method"],
        "ranks": topology.get("nodes", 0) * topology.get("processesPerNode", 1),
        "spot": "spot" in spec["recovery"] if "recovery" in spec else False,
        "class": things.get("PersistentVolumeClaim", {}).get("storageClassName"),
        "prior": "classPrompt" in training.get("dreambooth", {}),
    }
    assert ASKED[path.stem].items() <= shown.items()
