"""Export pods on a real API server, and `finetune export --cluster`, which asks for them by the job alone."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.outputs.request import ExportedOutput, ExportResult
from finetune_operator.api.labels import EXPORT
from finetune_operator.cli.commands.export import export
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.main import main, parser
from testing.controlplane.process import wait_for
from testing.operator.harness import Jobs, build_job, running
from tests.operator.conftest import NewOperator, all_run

POD = "circles-export"
SHA = "ab" * 32
OPENVINO = {"format": "openvino", "to": "s3://models/ov"}
TO = "s3://models/kohya"


def end(jobs: Jobs, name: str, code: int = 0, result: ExportResult | None = None) -> None:
    """Report the end of a pod's container, as a kubelet would."""
    terminated: dict[str, Any] = {"exitCode": code, "finishedAt": "2026-01-01T00:00:00Z"}
    if result is not None:
        terminated["message"] = result.to_json()
    phase = "Failed" if code else "Succeeded"
    container = {"name": "trainer", "state": {"terminated": terminated}}
    jobs.set_pod_status(name, {"phase": phase, "containerStatuses": [container]})


def start_export(jobs: Jobs, other_than: str = "") -> str:
    """Wait until the export pod exists, and that kwok runs it; return its UID."""

    def uid() -> str | None:
        pod = jobs.pods().get(POD)
        is_new = pod is not None and pod["metadata"]["uid"] != other_than and pod["status"]["phase"] == "Running"
        return str(pod["metadata"]["uid"]) if pod is not None and is_new else None

    found = wait_for("the export pod runs", uid)
    assert found is not None
    return found


def complete(index: int = 0) -> ExportResult:
    return ExportResult(step=50, outputs=(ExportedOutput(index=index, size_bytes=2048, sha256=SHA),))


@pytest.mark.cluster
def test_export_pods_of_a_job_and_of_the_command(
    jobs: Jobs, new_operator: NewOperator, capsys: pytest.CaptureFixture[str]
) -> None:
    restricted = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    jobs.control_plane.api.patch(f"/api/v1/namespaces/{jobs.namespace}", restricted)
    kubeconfig = jobs.control_plane.kubeconfig
    command = ["export", "circles", "-n", jobs.namespace, "--cluster", "--kubeconfig", str(kubeconfig)]
    with running(new_operator()):
        storage = {"persistentVolumeClaim": {"claimName": "shared"}}
        jobs.create(build_job("circles", outputs=[OPENVINO], checkpoint={"storage": storage}))
        _provide_claim(jobs)
        wait_for("the pods run", lambda: all_run(jobs))

        # -- a request during the training: the pod runs where the claim is attached
        gang = jobs.pods()
        request = json.dumps({"id": "during", "outputs": [{"format": "kohya", "to": TO}]})
        jobs.patch("circles", {"metadata": {"annotations": {EXPORT: request}}})
        during = start_export(jobs)
        assert jobs.pods()[POD]["spec"]["nodeName"] in {pod["spec"]["nodeName"] for pod in gang.values()}
        end(jobs, POD, result=complete())

        for name in gang:
            end(jobs, name)
        first = start_export(jobs, other_than=during)
        assert jobs.wait_phase("circles", "Exporting")["attempt"] == 1
        end(jobs, POD, result=complete())
        status = jobs.wait_phase("circles", "Succeeded")
        output = next(each for each in status["outputs"] if each["format"] == "openvino")
        assert (output["state"], output["bytes"], output["sha256"]) == ("Written", 2048, SHA)

        # -- a request, after the end of the job
        chosen = ["--step", "50", "--format", "kohya", "--to", TO]
        with pytest.raises(SystemExit) as ended:
            main([*command, *chosen, "--dry-run"])
        assert ended.value.code == Exit.SUCCEEDED
        assert capsys.readouterr().out == f"step 50: would write kohya to {TO}\n"
        codes = []
        player = threading.Thread(target=lambda: codes.append(_run([*command, *chosen])))
        player.start()
        second = start_export(jobs, other_than=first)
        assert json.loads(_env(jobs.pods()[POD])["FINETUNE_EXPORT"])["step"] == 50
        end(jobs, POD, result=complete())
        player.join()
        text = capsys.readouterr().out
        assert (codes, text.splitlines()[-1]) == ([Exit.SUCCEEDED], f"step 50: wrote kohya to {TO} (2.0 KiB)")

        # -- a failure that another pod cannot change
        player = threading.Thread(target=lambda: codes.append(_run([*command, *chosen])))
        player.start()
        start_export(jobs, other_than=second)
        end(jobs, POD, 64, ExportResult(message="step: the job has no checkpoint of step 50"))
        player.join()
        assert codes[-1] == Exit.FAILED
        assert "the job has no checkpoint of step 50" in capsys.readouterr().err
        assert jobs.status("circles")["phase"] == "Succeeded"

        _run([*command, "--list"])
        text = capsys.readouterr().out
        assert TO in text
        assert "the job has no checkpoint of step 50" in text


def _run(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def _env(pod: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}


def _provide_claim(jobs: Jobs) -> None:
    """Create the claim of the job, already bound: no provisioner runs here."""
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": jobs.namespace},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteMany"],
            "hostPath": {"path": "/data"},
            "storageClassName": "",
            "claimRef": {"namespace": jobs.namespace, "name": "shared"},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "shared"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Gi"}},
            "storageClassName": "",
            "volumeName": jobs.namespace,
        },
    }
    jobs.control_plane.api.create("/api/v1/persistentvolumes", volume)
    path = f"/api/v1/namespaces/{jobs.namespace}/persistentvolumeclaims"
    jobs.control_plane.api.create(path, claim)


def test_a_folder_cannot_be_given_with_a_cluster(tmp_path: Path) -> None:
    arguments = parser().parse_args(["export", "circles", "--cluster", "--folder", str(tmp_path)])
    with pytest.raises(UsageError, match="leave --folder or --cluster out"):
        export(arguments)
