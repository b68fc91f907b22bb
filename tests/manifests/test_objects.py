"""The service, the ConfigMap and the run specification; manifests contain only fields that Kubernetes has."""

from __future__ import annotations

import re
from typing import Any

import pytest
from kubernetes import client

from finetune_contract.run_spec import RunSpec
from finetune_operator.api.labels import JOB
from finetune_operator.manifests import build_config, build_pod, build_run_spec, build_service, global_batch, num_nodes
from finetune_operator.settings import Settings
from tests.plan.fake_cluster import make_job

SETTINGS = Settings(coordinator_url="https://coordinator:8443", coordinator_ca_config="ca", cache_claim="cache")


def test_service_is_headless_and_publishes_addresses_that_are_not_ready() -> None:
    service = build_service(make_job(), SETTINGS)
    assert service["metadata"]["name"] == "circles"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    pod = build_pod(make_job(), 3, 0, SETTINGS)
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    # The endpoint controllers compare the labels of all pods in the namespace, the first one by name first.
    assert min(service["spec"]["selector"]) == JOB
    assert service["metadata"]["ownerReferences"] == pod["metadata"]["ownerReferences"]


@pytest.mark.parametrize(("nodes", "ranks"), [({"nodes": 3}, [0]), ({"minNodes": 2, "maxNodes": 3}, [0, 1, 2])])
def test_service_selects_the_pods_that_may_run_the_rendezvous(nodes: dict[str, Any], ranks: list[int]) -> None:
    job = make_job(topology={"accelerator": "cpu"} | nodes)
    selector = build_service(job, SETTINGS)["spec"]["selector"].items()
    pods = [build_pod(job, 1, rank, SETTINGS)["metadata"]["labels"] for rank in range(num_nodes(job.spec))]
    assert [rank for rank, labels in enumerate(pods) if selector <= labels.items()] == ranks


@pytest.mark.parametrize(
    ("training", "rate", "centred"),
    [
        ({"method": "LoRA"}, 1e-4, False),
        ({"method": "DreamBooth", "dreambooth": {"instancePrompt": "a dog"}}, 5e-6, False),
        ({"method": "Full", "optimizer": "prodigy"}, 1.0, False),
        ({"method": "Full", "learningRate": 3e-5, "centerCrop": True}, 3e-5, True),
    ],
)
def test_run_specification_records_the_defaults_of_the_method(
    training: dict[str, Any], rate: float, centred: bool
) -> None:
    """All attempts read it, so a later version with other defaults does not change a job that has begun."""
    found = build_run_spec(make_job(training={"steps": 10, **training})).training
    assert (found.learning_rate, found.center_crop) == (rate, centred)


def test_run_specification_is_read_back() -> None:
    job = make_job(outputs=[{"format": "diffusers", "to": "/out"}], checkpoint={"interval": {"steps": 10}, "keep": 2})
    config = build_config(job)
    assert config["metadata"]["name"] == "circles-run"
    run = RunSpec.model_validate_json(config["data"]["run.json"])
    assert run == build_run_spec(job)
    assert (run.namespace, run.job, run.uid) == ("default", "circles", "1f0c3a2b-0000")
    assert (run.checkpoint_interval.steps, run.keep, run.outputs[0].to) == (10, 2, "/out")


@pytest.mark.parametrize(
    ("topology", "training", "nodes", "batch"),
    [
        ({}, {}, 1, 1),
        ({"nodes": 2}, {"batchSize": 4}, 2, 8),
        ({"nodes": 2, "processesPerNode": 8}, {"batchSize": 4, "gradientAccumulation": 2}, 2, 128),
        ({"minNodes": 1, "maxNodes": 4}, {"batchSize": 2}, 4, 8),
    ],
)
def test_global_batch(topology: dict[str, Any], training: dict[str, Any], nodes: int, batch: int) -> None:
    spec = make_job(topology={"accelerator": "cpu"} | topology, training={"method": "LoRA", "steps": 1} | training).spec
    assert num_nodes(spec) == nodes
    assert global_batch(spec) == batch


KINDS = {"Pod": "V1Pod", "Service": "V1Service", "ConfigMap": "V1ConfigMap"}


def unknown_fields(value: Any, kind: str, path: str) -> list[str]:
    """Return the fields that the client's definition of the API does not contain."""
    if listed := re.fullmatch(r"list\[(.+)\]", kind):
        return [fault for item in value for fault in unknown_fields(item, listed[1], path + "[]")]
    if mapped := re.fullmatch(r"dict\(str, (.+)\)", kind):
        return [fault for item in value.values() for fault in unknown_fields(item, mapped[1], path + "{}")]
    model = getattr(client, kind, None)
    if model is None:
        scalar = {"str": str, "int": int, "bool": bool}.get(kind)
        return [] if scalar is None or isinstance(value, scalar) else [f"{path} is not {kind}"]
    names = {json_name: name for name, json_name in model.attribute_map.items()}
    faults = [f"{path}.{key} is unknown" for key in value if key not in names]
    for key in value.keys() & names.keys():
        faults += unknown_fields(value[key], model.openapi_types[names[key]], f"{path}.{key}")
    return faults


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_manifests_have_no_unknown_fields(accelerator: str) -> None:
    job = make_job(
        topology={"accelerator": accelerator, "nodes": 2, "resources": {"memory": "1Gi"}},
        checkpoint={"storage": {"nfs": {"server": "s", "path": "/"}}},
        secrets=[{"name": "hub"}],
        priorityClassName="high",
    )
    for manifest in (build_pod(job, 1, 0, SETTINGS), build_service(job, SETTINGS), build_config(job)):
        assert unknown_fields(manifest, KINDS[manifest["kind"]], manifest["kind"]) == []
