"""`finetune validate`: the manifest alone, this machine with --here, a real API server with --cluster."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.api import crd
from finetune_operator.cli.commands.validate import validate
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.main import parser
from finetune_operator.cli.preflight.cluster import compare_quota, find_unavailable, requests_of
from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.process import wait_for
from testing.controlplane.server import ControlPlane

GPU_JOB: dict[str, Any] = {
    "apiVersion": "finetune-operator.io/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "circles"},
    "spec": {
        "model": {"base": "/nowhere/model"},
        "dataset": {"source": "/nowhere/data"},
        "training": {"method": "LoRA", "steps": 40},
        "topology": {"accelerator": "gpu", "nodes": 2},
        "checkpoint": {"storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}}},
    },
}
CLAIM: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "checkpoints"},
    "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
}


def call(folder: Path, documents: list[dict[str, Any]], *flags: str) -> Exit:
    """Run the command in this process."""
    file = folder / "job.yaml"
    file.write_text("---\n".join(json.dumps(document) + "\n" for document in documents))
    return validate(parser().parse_args(["validate", str(file), "--home", str(folder / "home"), *flags]))


def problems(folder: Path, documents: list[dict[str, Any]], *flags: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        call(folder, documents, *flags)
    return [line.partition("job.yaml: ")[2] for line in str(caught.value).splitlines()]


def test_a_manifest_for_a_cluster_is_valid_on_a_laptop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, [CLAIM, GPU_JOB]) is Exit.SUCCEEDED
    assert capsys.readouterr().out == "finetunejob 'circles' is valid\n"


def test_here_also_checks_this_machine(tmp_path: Path) -> None:
    found = problems(tmp_path, [GPU_JOB], "--here")
    assert any(each.startswith("spec.model.base: /nowhere/model does not exist") for each in found)
    assert any(each.startswith("spec.dataset.source: /nowhere/data does not exist") for each in found)


def test_what_no_operator_runs_is_refused_without_flags(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, [GPU_JOB], "--set", "topology.cpu.ipex=on")
    assert found.startswith("spec.topology.cpu.ipex: IPEX is for CPUs")


def test_requests_of_a_pod() -> None:
    container = {"name": "trainer", "resources": {"requests": {"cpu": "500m"}, "limits": {"nvidia.com/gpu": 4}}}
    sidecar = {"name": "proxy", "resources": {"requests": {"cpu": "100m"}}}
    pod = {"spec": {"containers": [container, sidecar]}}
    assert requests_of(pod) == {"cpu": Decimal("0.6"), "nvidia.com/gpu": Decimal(4)}


@pytest.mark.parametrize(
    ("hard", "used", "spec", "num_problems", "num_warnings"),
    [
        ({"requests.nvidia.com/gpu": "8"}, {}, {}, 0, 0),
        ({"requests.nvidia.com/gpu": "4"}, {}, {}, 1, 0),
        ({"requests.nvidia.com/gpu": "8"}, {"requests.nvidia.com/gpu": "1"}, {}, 0, 1),
        ({"requests.cpu": "1500m"}, {}, {}, 1, 0),
        ({"cpu": "2"}, {"cpu": "500m"}, {}, 0, 1),
        ({"pods": "1"}, {}, {}, 1, 0),
        ({"limits.cpu": "1"}, {}, {}, 0, 0),
        ({"requests.storage": "1"}, {}, {}, 0, 0),
        ({"pods": "1"}, {}, {"scopes": ["BestEffort"]}, 0, 0),
    ],
)
def test_quotas(
    hard: dict[str, str], used: dict[str, str], spec: dict[str, Any], num_problems: int, num_warnings: int
) -> None:
    quota = {"metadata": {"name": "team"}, "spec": {"hard": hard, **spec}, "status": {"used": used}}
    found = compare_quota(quota, {"cpu": Decimal(1), "nvidia.com/gpu": Decimal(4)}, num_pods=2)
    assert tuple(map(len, found)) == (num_problems, num_warnings)


def test_a_resource_that_no_node_offers_is_named() -> None:
    nodes = [
        {"status": {"allocatable": {"cpu": "8", "nvidia.com/gpu": "2"}}},
        {"status": {"allocatable": {"cpu": "2"}}},
    ]
    assert find_unavailable(nodes, {"cpu": Decimal(4), "nvidia.com/gpu": Decimal(2)}) is None
    assert find_unavailable(nodes, {"nvidia.com/gpu": Decimal(4)}) == ("nvidia.com/gpu", "4")


def serves(control_plane: ControlPlane, path: str) -> bool:
    try:
        return "items" in control_plane.api.get(path)
    except ControlPlaneApiError:
        return False


def test_cluster_checks_against_a_real_api_server(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control_plane.kubectl("apply", "--server-side", "-f", "-", stdin=crd.render())
    jobs = f"/apis/finetune-operator.io/v1alpha1/namespaces/{namespace}/finetunejobs"
    wait_for("the CRD is served", lambda: serves(control_plane, jobs))
    document = {**GPU_JOB, "metadata": {"name": "circles", "namespace": namespace}}
    flags = ("--cluster", "--kubeconfig", str(control_plane.kubeconfig))
    found = problems(tmp_path, [document], *flags, "--set", "priorityClassName=urgent")
    text = "\n".join(found)
    assert "claimName: checkpoints does not exist in the cluster; create the claim" in text
    assert "spec.priorityClassName: urgent does not exist in the cluster" in text
    # This cluster serves no PodGroup.
    found = problems(tmp_path, [CLAIM, document], *flags, "--set", "scheduling=podGroup")
    assert len(found) == 1
    assert "spec.scheduling: the cluster does not serve a PodGroup of scheduling.k8s.io/v1beta1" in found[0]
    claim = {**CLAIM, "spec": {**CLAIM["spec"], "accessModes": ["ReadWriteOnce"], "storageClassName": "missing"}}
    text = "\n".join(problems(tmp_path, [claim, document], *flags))
    assert "checkpoints is not ReadWriteMany, and the 2 pods of the job may run on several nodes" in text
    assert "the storage class missing of checkpoints does not exist" in text
    outside = ("--set", "outputs=[{format: diffusers, to: /outputs/lora}]")
    text = "\n".join(problems(tmp_path, [CLAIM, document], *flags, *outside))
    assert "spec.outputs[0].to: /outputs/lora is on no volume of the pods" in text
    # More than any node of another test has.
    many = ("--set", "topology.processesPerNode=64")
    assert call(tmp_path, [CLAIM, document], *flags, *many) is Exit.SUCCEEDED
    captured = capsys.readouterr()
    assert captured.out == "finetunejob 'circles' is valid and can run on the cluster\n"
    assert "no node offers nvidia.com/gpu: 64" in captured.err
    assert control_plane.api.get(jobs)["items"] == []
