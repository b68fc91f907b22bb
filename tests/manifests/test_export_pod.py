"""The manifest of the export pod: what it shares with a training pod, and what it must not have."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from finetune_contract import environment
from finetune_contract.outputs.request import ExportRequest
from finetune_operator.api import labels
from finetune_operator.manifests import build_pod
from finetune_operator.manifests.export_pod import build_export_pod, hash_request
from finetune_operator.settings import Settings
from tests.manifests.test_pods import CLAIM, SETTINGS, env_of, trainer, volume
from tests.plan.fake_cluster import make_job

OPENVINO = {"format": "openvino", "to": "hub://me/ov", "secret": {"name": "hub"}}
GPU = {"accelerator": "gpu", "nodes": 2, "processesPerNode": 4, "resources": {"cpu": 8, "memory": "64Gi"}}


def export_pod(written: Any = (OPENVINO,), **spec: Any) -> dict[str, Any]:
    request = ExportRequest.model_validate({"step": 5, "outputs": written})
    return build_export_pod(make_job(checkpoint=CLAIM, **spec), request, SETTINGS)


def test_it_belongs_to_the_job_and_to_no_attempt() -> None:
    pod = export_pod()
    assert pod["metadata"]["name"] == "circles-export"
    own = pod["metadata"]["labels"]
    assert labels.ATTEMPT not in own
    request = ExportRequest.model_validate({"step": 5, "outputs": [OPENVINO]})
    assert own[labels.EXPORT] == hash_request(request)
    assert pod["metadata"]["ownerReferences"][0]["name"] == "circles"
    assert ExportRequest.model_validate_json(env_of(pod)[environment.EXPORT]) == request


def test_it_reaches_the_targets_and_the_checkpoints_as_a_training_pod_does() -> None:
    training = build_pod(make_job(checkpoint=CLAIM, outputs=[OPENVINO]), 1, 0, SETTINGS)
    pod = export_pod(secrets=[{"name": "s3"}], outputs=[OPENVINO])
    for name in ("checkpoints", "run", "output-secret-0", "scratch"):
        assert volume(pod, name) == volume(training, name)
    for name in (environment.CHECKPOINT_DIR, environment.CACHE_DIR, environment.OUTPUT_SECRETS, environment.RUN_SPEC):
        assert env_of(pod)[name] == env_of(training)[name]
    assert trainer(pod)["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert pod["spec"]["securityContext"] == training["spec"]["securityContext"]
    assert trainer(pod)["securityContext"] == trainer(training)["securityContext"]
    # It sends no heartbeats, so it needs no token.
    assert [each["name"] for each in pod["spec"]["volumes"] if "projected" in each] == []


def test_it_requests_no_accelerators_and_tolerates_their_nodes() -> None:
    pod = export_pod(topology=GPU)
    assert trainer(pod)["resources"] == {
        "requests": {"cpu": "8", "memory": "64Gi"},
        "limits": {"cpu": "8", "memory": "64Gi"},
    }
    assert pod["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert "requiredDuringSchedulingIgnoredDuringExecution" not in pod["spec"]["affinity"]["podAffinity"]


def test_it_prefers_the_nodes_on_which_the_claims_of_the_job_are_attached() -> None:
    selector = {"matchLabels": {labels.JOB: "circles"}}
    term = {"labelSelector": selector, "topologyKey": "kubernetes.io/hostname"}
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    near = {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
    assert export_pod()["spec"]["affinity"] == near
    request = ExportRequest.model_validate({"step": 5, "outputs": [OPENVINO]})

    def affinity(settings: Settings = SETTINGS, **spec: Any) -> object:
        storage = {"storage": {"bucket": {"url": "s3://b"}}}
        return build_export_pod(make_job(checkpoint=storage, **spec), request, settings)["spec"].get("affinity")

    assert affinity() is None
    assert affinity(replace(SETTINGS, cache_claim="cache")) == near
    models = {"name": "models", "persistentVolumeClaim": {"claimName": "models"}}
    assert affinity(podTemplate={"spec": {"volumes": [models]}}) == near
    # Preferences of the job remain.
    spot = export_pod(recovery={"spot": {}})["spec"]["affinity"]
    assert set(spot) == {"nodeAffinity", "podAffinity"}


def test_its_image_depends_on_the_formats() -> None:
    assert trainer(export_pod())["image"] == SETTINGS.trainer_image_export
    assert trainer(export_pod([{"format": "kohya", "to": "k"}]))["image"] == SETTINGS.trainer_image_cpu


def test_pod_template_adds_what_training_pods_have_but_not_their_image_command_or_gpus() -> None:
    container = {
        "name": "trainer",
        "image": "mine:1",
        "command": ["wrapper"],
        "args": ["x"],
        "resources": {"limits": {"nvidia.com/gpu": "4"}},
        "env": [{"name": "HTTPS_PROXY", "value": "http://proxy"}],
        "volumeMounts": [{"name": "models", "mountPath": "/models"}],
    }
    template = {
        "spec": {
            "serviceAccountName": "trainer",
            "containers": [container],
            "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        }
    }
    pod = export_pod(podTemplate=template)
    own = trainer(pod)
    assert own["image"] == SETTINGS.trainer_image_export
    assert own["command"] == list(SETTINGS.export_command)
    assert "args" not in own
    assert "nvidia.com/gpu" not in json.dumps(own["resources"])
    assert pod["spec"]["serviceAccountName"] == "trainer"
    assert env_of(pod)["HTTPS_PROXY"] == "http://proxy"
    assert volume(pod, "models") == template["spec"]["volumes"][0]
    # Formats that the image of the job can write keep it.
    assert trainer(export_pod([{"format": "kohya", "to": "k"}], podTemplate=template))["image"] == "mine:1"
