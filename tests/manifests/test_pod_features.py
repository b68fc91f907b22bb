"""Newer features of pods: image volumes, claims for GPUs, and user namespaces."""

from __future__ import annotations

from finetune_contract import environment
from finetune_contract.outputs.request import ExportRequest
from finetune_operator.manifests import build_config
from finetune_operator.manifests.export_pod import build_export_pod
from finetune_operator.settings import Settings
from tests.manifests.test_pods import CLAIM, env_of, pod_of, trainer, volume
from tests.plan.fake_cluster import make_job


def test_image_of_the_model_is_mounted_and_the_trainer_reads_a_folder() -> None:
    image = {"reference": "registry.example.com/sdxl:1.0", "pullPolicy": "Always"}
    pod = pod_of(model={"base": "/finetune/model/sdxl", "variant": "fp16", "image": image})
    assert volume(pod, "model") == {"name": "model", "image": image}
    assert {"name": "model", "mountPath": "/finetune/model", "readOnly": True} in trainer(pod)["volumeMounts"]
    # Without a policy, Kubernetes chooses it by the tag.
    pod = pod_of(model={"base": "/finetune/model", "image": {"reference": "sdxl"}})
    assert volume(pod, "model") == {"name": "model", "image": {"reference": "sdxl"}}
    folder = {"base": "/finetune/model/sdxl", "variant": "fp16"}
    configs = [build_config(make_job(model=model)) for model in (folder, folder | {"image": image})]
    assert configs[0]["data"] == configs[1]["data"]


def test_gpus_of_a_claim_replace_the_resource() -> None:
    topology = {"accelerator": "gpu", "processesPerNode": 4, "resources": {"memory": "8Gi"}}
    pod = pod_of(topology=topology | {"gpuClaimTemplateName": "four-gpus"})
    assert pod["spec"]["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": "four-gpus"}]
    resources = trainer(pod)["resources"]
    assert resources == {
        "limits": {"memory": "8Gi"},
        "requests": {"memory": "8Gi", "cpu": "4"},
        "claims": [{"name": "gpus"}],
    }
    assert env_of(pod)[environment.PROCESSES_PER_NODE] == "4"
    plain = pod_of(topology=topology)
    assert "resourceClaims" not in plain["spec"]
    assert trainer(plain)["resources"]["limits"]["nvidia.com/gpu"] == "4"


def test_user_namespaces_are_used_only_where_all_volumes_support_them() -> None:
    settings = Settings(user_namespaces=True)
    nfs = {"storage": {"nfs": {"server": "nfs", "path": "/a"}}}
    assert pod_of(settings=settings, checkpoint=CLAIM)["spec"]["hostUsers"] is False
    assert "hostUsers" not in pod_of(settings=settings, checkpoint=nfs)["spec"]
    assert "hostUsers" not in pod_of(checkpoint=CLAIM)["spec"]
    # A job with a volume that the operator does not know decides for itself.
    own = {"spec": {"hostUsers": True}}
    assert pod_of(settings=settings, checkpoint=CLAIM, podTemplate=own)["spec"]["hostUsers"] is True


def test_export_pod_reads_the_image_without_a_claim() -> None:
    image = {"reference": "registry.example.com/sdxl:1.0"}
    topology = {"accelerator": "gpu", "nodes": 2, "gpuClaimTemplateName": "one-gpu", "pack": "zone"}
    job = make_job(model={"base": "/finetune/model", "image": image}, topology=topology, checkpoint=CLAIM)
    request = ExportRequest.model_validate({"outputs": [{"format": "diffusers", "to": "out"}]})
    pod = build_export_pod(job, request, Settings(user_namespaces=True))
    assert volume(pod, "model") == {"name": "model", "image": image}
    assert pod["spec"]["hostUsers"] is False
    assert "resourceClaims" not in pod["spec"]
    assert "claims" not in trainer(pod)["resources"]
    assert "requiredDuringSchedulingIgnoredDuringExecution" not in pod["spec"]["affinity"]["podAffinity"]
