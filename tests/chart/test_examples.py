"""Every manifest in examples/ is taken by a real API server with the CRD of the chart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.chart.helm import CHART, HOME, RELEASE, Helm
from tests.controlplane.server import ControlPlane, KubectlError

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


def test_there_is_one_for_each_way_to_train() -> None:
    assert len(EXAMPLES) >= 7
