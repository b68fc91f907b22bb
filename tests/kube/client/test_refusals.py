"""Classification of refused creations: the message, and whether the operator holds the job or retries."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_operator.cluster.kube.client.client import ApiError
from finetune_operator.cluster.kube.client.refusals import HOLD, Refusals, classify_refusal
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.types import Refusal
from tests.plan.fake_cluster import make_job

NOW = datetime(2026, 1, 1, tzinfo=UTC)
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


@pytest.mark.parametrize("changed", [{"generation": 2}, {"uid": "another"}])
def test_edit_or_new_job_of_the_same_name_clears_a_refusal(changed: dict[str, Any]) -> None:
    refusals, job, refusal = Refusals(), make_job(), Refusal("no")
    refusals.record(KEY, job, refusal)
    assert refusals.get(KEY, job) == refusal
    newer = job.model_copy(update={"metadata": job.metadata.model_copy(update=changed)})
    assert refusals.get(KEY, newer) is None
    refusals.forget(KEY)
    assert refusals.get(KEY, job) is None
