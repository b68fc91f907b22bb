"""Classification of refused creations: the message, and whether the operator holds the job or retries."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_operator.cluster.kube.client.client import ApiError
from finetune_operator.cluster.kube.client.refusals import HOLD, Refusals, classify_refusal
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.manifests import build_pod
from finetune_operator.plan.model.types import Refusal
from finetune_operator.settings import Settings
from tests.plan.fake_cluster import make_job

NOW = datetime(2026, 1, 1, tzinfo=UTC)
IMAGE = {"base": "/finetune/model", "image": {"reference": "registry.example.com/sdxl:1.0"}}
STRICT = 'Pod in version "v1" cannot be handled as a Pod: strict decoding error: '
KEY = JobKey("default", "circles")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            STRICT + 'unknown field "spec.containers[0].imagePulPolicy"',
            "spec.podTemplate.spec.containers[0].imagePulPolicy: a pod has no field imagePulPolicy; "
            "write imagePullPolicy, or remove it",
        ),
        (
            STRICT + 'unknown field "spec.containers[0].colour"',
            "spec.podTemplate.spec.containers[0].colour: a pod has no field colour; "
            "write a field that 'kubectl explain pod.spec.containers' lists, or remove it",
        ),
        (
            STRICT + 'unknown field "specs"',
            "spec.podTemplate.specs: a pod has no field specs; write spec, or remove it",
        ),
        (
            STRICT + 'unknown field "spec.a", unknown field "spec.b"',
            "spec.podTemplate.spec.a: a pod has no field a; write a field that 'kubectl explain pod.spec' lists, "
            "or remove it. spec.podTemplate.spec.b: a pod has no field b; "
            "write a field that 'kubectl explain pod.spec' lists, or remove it",
        ),
        (
            'Pod "circles-a1-n0" is invalid: spec.tolerations[0].operator: Unsupported value: "Perhaps".',
            'spec.podTemplate: the API server rejects the pod: Pod "circles-a1-n0" is invalid: '
            'spec.tolerations[0].operator: Unsupported value: "Perhaps"; '
            "correct spec.podTemplate and apply the job again",
        ),
    ],
)
def test_invalid_pod_template_holds_the_job(message: str, expected: str) -> None:
    job = make_job(podTemplate={"spec": {"colour": "red"}})
    error = ApiError(422, "Invalid", message)
    refusal = classify_refusal(job, "Pod", "circles-a1-n0", error, NOW)
    assert refusal == Refusal(expected, hold_until=NOW + HOLD)


def test_refusal_without_a_template_is_a_matter_for_the_administrator() -> None:
    error = ApiError(400, "BadRequest", "denied by policy")
    refusal = classify_refusal(make_job(), "Pod", "circles-a1-n0", error, NOW)
    assert refusal is not None
    assert "ask your cluster administrator" in refusal.message


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (403, Refusal("the API server refused to create Pod circles-a1-n0: exceeded quota")),
        (429, None),
        (500, None),
        (0, None),
    ],
)
def test_transient_refusals_do_not_hold_the_job(status: int, expected: Refusal | None) -> None:
    error = ApiError(status, "", "exceeded quota")
    assert classify_refusal(make_job(), "Pod", "circles-a1-n0", error, NOW) == expected


DEFAULT_LIMIT = (
    'Pod "circles-a1-n0" is invalid: spec.containers[0].resources.requests: Invalid value: "1": '
    "must be less than or equal to cpu limit of 500m"
)


@pytest.mark.parametrize(
    ("status", "message", "example"),
    [
        (422, DEFAULT_LIMIT, ", e.g. cpu: 500m, which sets both"),
        (403, "maximum cpu usage per Container is 500m, but limit is 1", ", which sets both"),
        (403, "minimum memory usage per Pod is 1Gi, but request is 100Mi", ", which sets both"),
        (403, "cpu max limit to request ratio per Container is 1, but provided ratio is 2", ", which sets both"),
        (403, "failed quota: team: must specify limits.cpu for: trainer", ", which sets both"),
    ],
)
def test_limits_of_the_namespace_are_met_in_topology_resources(status: int, message: str, example: str) -> None:
    refusal = classify_refusal(make_job(), "Pod", "circles-a1-n0", ApiError(status, "", message), NOW)
    assert refusal is not None
    assert message in refusal.message
    assert f"write what each pod needs in spec.topology.resources{example}" in refusal.message
    assert "administrator" not in refusal.message


def test_advice_about_the_default_limit_of_a_namespace_works() -> None:
    """The API server then compares the request with the limit that the pod sets itself."""
    job = make_job(topology={"accelerator": "cpu", "nodes": 2, "resources": {"cpu": "500m"}})
    resources = build_pod(job, 1, 0, Settings())["spec"]["containers"][0]["resources"]
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"] == "500m"


def test_resources_of_the_template_are_corrected_there() -> None:
    container = {"name": "trainer", "resources": {"requests": {"cpu": "1"}}}
    job = make_job(podTemplate={"spec": {"containers": [container]}})
    refusal = classify_refusal(job, "Pod", "circles-a1-n0", ApiError(422, "", DEFAULT_LIMIT), NOW)
    assert refusal is not None
    assert "correct spec.podTemplate" in refusal.message


def test_delay_of_the_next_creation_increases_with_each_failure() -> None:
    refusals, job, now = Refusals(), make_job(), NOW
    seconds = []
    for _ in range(12):
        seconds.append(refusals.hold(KEY, job, now))
        assert refusals.held_until(KEY, job) == now + timedelta(seconds=seconds[-1])
        now += timedelta(seconds=seconds[-1])
    assert seconds == [0.25, 0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert refusals.hold(KEY, job, now, least_seconds=90) == 90
    refusals.forget(KEY)
    assert refusals.held_until(KEY, job) is None
    assert refusals.hold(KEY, job, now) == 0.25


@pytest.mark.parametrize("change", ["edit", "attempt"])
def test_edit_and_new_attempt_create_without_delay(change: str) -> None:
    refusals, job = Refusals(), make_job()
    refusals.hold(KEY, job, NOW)
    if change == "edit":
        newer = job.model_copy(update={"metadata": job.metadata.model_copy(update={"generation": 2})})
    else:
        newer = job.model_copy(update={"status": job.status.model_copy(update={"attempt": 2})})
    assert refusals.held_until(KEY, newer) is None


@pytest.mark.parametrize("changed", [{"generation": 2}, {"uid": "another"}])
def test_edit_or_new_job_of_the_same_name_clears_a_refusal(changed: dict[str, Any]) -> None:
    refusals, job, refusal = Refusals(), make_job(), Refusal("no")
    refusals.record(KEY, job, refusal)
    assert refusals.get(KEY, job) == refusal
    newer = job.model_copy(update={"metadata": job.metadata.model_copy(update=changed)})
    assert refusals.get(KEY, newer) is None
    refusals.forget(KEY)
    assert refusals.get(KEY, job) is None


@pytest.mark.parametrize(
    "message",
    [
        STRICT + 'unknown field "spec.volumes[4].image"',
        'Pod "circles-a1-n0" is invalid: [spec.volumes[4]: Required value: must specify a volume type, '
        'spec.containers[0].volumeMounts[4].name: Not found: "model"]',
    ],
)
@pytest.mark.parametrize("template", [None, {"spec": {"nodeSelector": {"a": "b"}}}])
def test_cluster_without_image_volumes_is_named(message: str, template: dict[str, Any] | None) -> None:
    """Messages of Kubernetes 1.30, which does not know the field, and of 1.34, which drops it."""
    error = ApiError(422, "Invalid", message)
    refusal = classify_refusal(make_job(model=IMAGE, podTemplate=template), "Pod", "circles-a1-n0", error, NOW)
    assert refusal is not None
    assert refusal.message.startswith("spec.model.image: this cluster does not mount images")
    assert refusal.hold_until == NOW + HOLD
    other = classify_refusal(make_job(podTemplate=template), "Pod", "circles-a1-n0", error, NOW)
    assert other is not None
    assert "spec.model.image" not in other.message
