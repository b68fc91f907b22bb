"""What a refused create means for its job: the sentence, and whether there is use in trying again."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_operator.cluster.kube.client.client import ApiError
from finetune_operator.cluster.kube.client.refusals import HOLD, Refusals, judge
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.types import Refusal
from tests.plan.harness import make_job

NOW = datetime(2026, 1, 1, tzinfo=UTC)
STRICT = 'Pod in version "v1" cannot be handled as a Pod: strict decoding error: '
KEY = JobKey("default", "circles")


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            STRICT + 'unknown field "spec.containers[0].imagePulPolicy"',
            "spec.podTemplate.spec.containers[0].imagePulPolicy: a pod has no field imagePulPolicy; "
            "write imagePullPolicy, or leave it out",
        ),
        (
            STRICT + 'unknown field "spec.containers[0].colour"',
            "spec.podTemplate.spec.containers[0].colour: a pod has no field colour; "
            "write one that 'kubectl explain pod.spec.containers' shows, or leave it out",
        ),
        (
            STRICT + 'unknown field "specs"',
            "spec.podTemplate.specs: a pod has no field specs; write spec, or leave it out",
        ),
        (
            STRICT + 'unknown field "spec.a", unknown field "spec.b"',
            "spec.podTemplate.spec.a: a pod has no field a; write one that 'kubectl explain pod.spec' shows, "
            "or leave it out. spec.podTemplate.spec.b: a pod has no field b; "
            "write one that 'kubectl explain pod.spec' shows, or leave it out",
        ),
        (
            'Pod "circles-a1-n0" is invalid: spec.tolerations[0].operator: Unsupported value: "Perhaps".',
            'spec.podTemplate: the cluster takes no such pod: Pod "circles-a1-n0" is invalid: '
            'spec.tolerations[0].operator: Unsupported value: "Perhaps"; put it right and apply again',
        ),
    ],
)
def test_a_template_that_makes_no_pod(message: str, sentence: str) -> None:
    job = make_job(podTemplate={"spec": {"colour": "red"}})
    error = ApiError(422, "Invalid", message)
    assert judge(job, "Pod", "circles-a1-n0", error, NOW) == Refusal(sentence, hold_until=NOW + HOLD)


def test_what_is_refused_without_a_template_is_not_the_users_doing() -> None:
    refusal = judge(make_job(), "Pod", "circles-a1-n0", ApiError(400, "BadRequest", "denied by policy"), NOW)
    assert refusal is not None
    assert "show this to whoever runs the cluster" in refusal.sentence


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (403, Refusal("Pod circles-a1-n0 was refused: exceeded quota")),
        (429, None),
        (500, None),
        (0, None),
    ],
)
def test_what_may_pass_is_not_held_back(status: int, expected: Refusal | None) -> None:
    assert judge(make_job(), "Pod", "circles-a1-n0", ApiError(status, "", "exceeded quota"), NOW) == expected


@pytest.mark.parametrize("changed", [{"generation": 2}, {"uid": "another"}])
def test_an_edit_and_a_successor_begin_anew(changed: dict[str, Any]) -> None:
    refusals, job, refusal = Refusals(), make_job(), Refusal("no")
    refusals.take(KEY, job, refusal)
    assert refusals.of(KEY, job) == refusal
    newer = job.model_copy(update={"metadata": job.metadata.model_copy(update=changed)})
    assert refusals.of(KEY, newer) is None
    refusals.forget(KEY)
    assert refusals.of(KEY, job) is None
