"""Outputs that a pod cannot write, or that are lost with it, are refused before a pod exists."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.cluster.local.settings import LOCAL
from finetune_operator.manifests import build_pod
from finetune_operator.manifests.targets import find_misplaced_outputs
from finetune_operator.plan.policies.acceptance import find_pod_faults
from finetune_operator.settings import Settings
from tests.plan.fake_cluster import make_job

CLAIM = {"persistentVolumeClaim": {"claimName": "finetune"}}
BUCKET = {"bucket": {"url": "s3://models/checkpoints"}}


def mounted(volume: dict[str, Any], path: str = "/results", **mount: Any) -> dict[str, Any]:
    """Return a podTemplate with one more volume."""
    container = {"name": "trainer", "volumeMounts": [{"name": "results", "mountPath": path, **mount}]}
    return {"spec": {"volumes": [{"name": "results", **volume}], "containers": [container]}}


WRITABLE_ROOT = {"spec": {"containers": [{"name": "trainer", "securityContext": {"readOnlyRootFilesystem": False}}]}}


@pytest.mark.parametrize(
    ("to", "storage", "template", "problem"),
    [
        ("lora", CLAIM, None, None),
        ("lora", BUCKET, None, None),
        (".", BUCKET, None, None),
        ("/finetune/storage/outputs/lora", CLAIM, None, None),
        ("/finetune/storage/outputs/lora", BUCKET, None, "/finetune/storage is emptyDir"),
        ("../../../lora", BUCKET, None, "/finetune/storage is emptyDir"),
        ("../../../lora", CLAIM, None, None),
        ("/outputs/lora", CLAIM, None, "is on no volume of the pods, so it cannot be written"),
        ("/outputs/lora", CLAIM, WRITABLE_ROOT, "is on no volume of the pods, so it is lost with the pod"),
        ("/tmp/lora", CLAIM, None, "deleted with its pod"),
        ("/finetune/run/lora", CLAIM, None, "mounted read-only at /finetune/run"),
        ("/results/lora", BUCKET, mounted({"persistentVolumeClaim": {"claimName": "results"}}), None),
        ("/results/lora", BUCKET, mounted({"nfs": {"server": "nas", "path": "/"}}), None),
        ("/results/lora", CLAIM, mounted({"persistentVolumeClaim": {"claimName": "x"}}, readOnly=True), "read-only"),
        ("/results/lora", CLAIM, mounted({"configMap": {"name": "x"}}), "read-only"),
        ("/results/lora", CLAIM, mounted({"emptyDir": {}}), "/results is emptyDir"),
        ("/results-2/lora", CLAIM, mounted({"persistentVolumeClaim": {"claimName": "x"}}), "is on no volume"),
        ("/tmp/keep/lora", CLAIM, mounted({"persistentVolumeClaim": {"claimName": "x"}}, "/tmp/keep"), None),
    ],
)
def test_outputs_must_be_on_a_volume_that_outlives_the_pod(
    to: str, storage: dict[str, Any], template: dict[str, Any] | None, problem: str | None
) -> None:
    job = make_job(checkpoint={"storage": storage}, podTemplate=template, outputs=[{"format": "diffusers", "to": to}])
    found = list(find_misplaced_outputs(job, build_pod(job, 1, 0, Settings())))
    assert len(found) == (problem is not None)
    for message in found:
        assert message.startswith(f"spec.outputs[0].to: {to} is on ")
        assert (problem or "") in message
        assert message.endswith("; write a relative path, e.g. to: lora, for the job's own folder on its storage")


def test_a_local_run_writes_to_the_folders_of_the_machine() -> None:
    job = make_job(outputs=[{"format": "diffusers", "to": "/outputs/lora"}])
    assert find_pod_faults(job, LOCAL) == []
    assert find_pod_faults(job, Settings()) != []
