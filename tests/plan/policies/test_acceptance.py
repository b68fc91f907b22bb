"""The condition Accepted: all messages at once, one check per generation, and no pods of a refused spec."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import Condition
from finetune_operator.plan.model.conditions import find
from finetune_operator.plan.model.types import Refusal
from finetune_operator.settings import Settings
from tests.plan.fake_cluster import SETTINGS, START, FakeCluster, make_job, seconds

CPU = {"accelerator": "cpu"}
LORA = {"method": "LoRA", "steps": 10}

REFUSED = [
    ({"queueName": "gpus"}, Reason.NOT_SUPPORTED, "spec.queueName"),
    ({"training": LORA | {"epochs": 3}}, Reason.INVALID_SPEC, "spec.training"),
    ({"topology": CPU, "training": LORA | {"precision": "fp16"}}, Reason.INVALID_SPEC, "precision"),
    ({"podTemplate": {"spec": {"containers": [{"image": "mine"}]}}}, Reason.INVALID_SPEC, "spec.podTemplate"),
]


def accepted(cluster: FakeCluster) -> Condition:
    cluster.settle()
    condition = find(cluster.job.status, ConditionType.ACCEPTED)
    assert condition is not None
    return condition


@pytest.mark.parametrize(("spec", "reason", "field"), REFUSED)
def test_refused_spec_gets_message_and_no_pods(spec: dict[str, Any], reason: Reason, field: str) -> None:
    cluster = FakeCluster(make_job(**spec))
    condition = accepted(cluster)
    assert (condition.status, condition.reason) == ("False", reason)
    assert field in condition.message
    assert ";" in condition.message, "the message must contain what to write instead"
    status = cluster.job.status
    assert (status.phase, status.reason, status.message) == (Phase.PENDING, reason, condition.message)
    assert (status.attempt, cluster.pods, cluster.configs) == (0, {}, set())


def test_missing_storage_is_refused() -> None:
    cluster = FakeCluster(settings=Settings(coordinator_url="https://coordinator"))
    assert "spec.checkpoint.storage" in accepted(cluster).message
    claim = {"persistentVolumeClaim": {"claimName": "shared"}}
    cluster = FakeCluster(make_job(checkpoint={"storage": claim}), settings=cluster.settings)
    assert accepted(cluster).status == "True"


@pytest.mark.parametrize("spot", [{}, {"fallbackAfter": "30m"}])
def test_spot_is_accepted_and_rendered(spot: dict[str, str]) -> None:
    cluster = FakeCluster(make_job(recovery={"spot": spot}))
    assert accepted(cluster).status == "True"
    assert len(cluster.pods) == 2


def test_message_contains_all_faults() -> None:
    cluster = FakeCluster(make_job(queueName="gpus"), settings=Settings(coordinator_url="https://coordinator"))
    message = accepted(cluster).message
    assert "queueName" in message
    assert "checkpoint.storage" in message


def test_corrected_spec_is_accepted() -> None:
    cluster = FakeCluster(make_job(queueName="gpus"))
    accepted(cluster)
    cluster.tick(60)
    corrected = make_job().model_copy(update={"status": cluster.job.status})
    cluster.job = corrected.model_copy(
        update={"metadata": corrected.metadata.model_copy(update={"generation": 2})},
    )
    condition = accepted(cluster)
    assert (condition.status, condition.observed_generation) == ("True", 2)
    assert condition.last_transition_time == cluster.now
    assert cluster.job.status.observed_generation == 2
    assert cluster.job.status.attempt == 1


def test_refused_edit_affects_only_the_next_attempt() -> None:
    cluster = FakeCluster().running()
    edited = make_job(queueName="gpus").model_copy(update={"status": cluster.job.status})
    cluster.job = edited.model_copy(update={"metadata": edited.metadata.model_copy(update={"generation": 2})})
    assert accepted(cluster).status == "False"
    assert len(cluster.pods) == 2
    cluster.pods.clear()
    cluster.settle()
    assert (cluster.job.status.attempt, cluster.pods) == (1, {})
    assert cluster.job.status.phase is Phase.PENDING


def test_transition_time_is_the_first_acceptance() -> None:
    cluster = FakeCluster(settings=SETTINGS)
    accepted(cluster)
    cluster.tick(5)
    assert accepted(cluster).last_transition_time == START


WRONG = Refusal("spec.podTemplate.x: a pod has no field x; leave it out", hold_until=START + seconds(60))


def begun() -> FakeCluster:
    """Return a job whose first attempt has begun; its pods are created next."""
    cluster = FakeCluster()
    cluster.step()
    assert cluster.job.status.attempt == 1
    assert not cluster.pods
    return cluster


def edit(cluster: FakeCluster) -> None:
    """Change the spec. A refusal of the old spec does not apply to the new one."""
    meta = cluster.job.metadata.model_copy(update={"generation": cluster.job.metadata.generation + 1})
    cluster.job, cluster.refusal = cluster.job.model_copy(update={"metadata": meta}), None


def test_invalid_pods_are_held_back_and_retried() -> None:
    cluster = begun()
    cluster.refusal = WRONG
    decided = cluster.settle()
    condition = accepted(cluster)
    assert (condition.status, condition.reason, condition.message) == ("False", Reason.FAILED_CREATE, WRONG.message)
    assert cluster.job.status.phase is Phase.PENDING
    assert decided.requeue_after == seconds(60)
    assert not decided.actions
    cluster.tick(60)
    again = cluster.decide()
    assert len(again.actions) >= 2
    assert again.status == cluster.job.status, "the status changes only after the response of the API server"


def test_edit_lets_the_attempt_continue() -> None:
    cluster = begun()
    cluster.refusal = WRONG
    cluster.settle()
    edit(cluster)
    assert accepted(cluster).status == "True"
    assert (cluster.job.status.attempt, len(cluster.pods)) == (1, 2)


def test_refusal_survives_operator_restart() -> None:
    cluster = begun()
    cluster.refusal = WRONG
    cluster.settle()
    cluster.refusal = None
    decided = cluster.decide()
    assert decided.status == cluster.job.status
    assert len(decided.actions) >= 2, "the creation is tried again"
    # This time the API server accepts them.
    assert accepted(cluster).status == "True"


def test_quota_delays_the_job_without_refusing_it() -> None:
    cluster = begun()
    cluster.refusal = Refusal("the API server refused pod circles-a1-n0: exceeded quota")
    decided = cluster.decide()
    assert decided.actions, "the creation is tried again"
    assert (decided.status.phase, decided.status.reason) == (Phase.QUEUED, Reason.FAILED_CREATE)
    assert decided.status.message == cluster.refusal.message
    condition = find(decided.status, ConditionType.ACCEPTED)
    assert condition is not None
    assert condition.status == "True"


def test_invalid_edit_does_not_affect_running_pods() -> None:
    cluster = FakeCluster()
    cluster.settle()
    cluster.run_all()
    cluster.settle()
    edit(cluster)
    cluster.settle()
    cluster.vanish("circles-a1-n1")
    # The API server refuses the pods of the next attempt.
    for _ in range(5):
        if cluster.job.status.attempt < 2:
            cluster.step()
            cluster.tick(1)
    assert cluster.job.status.attempt == 2
    cluster.refusal = Refusal(WRONG.message, hold_until=cluster.now + seconds(60))
    cluster.settle()
    assert accepted(cluster).status == "False"
    assert cluster.job.status.phase is Phase.RECOVERING
    assert cluster.job.status.message == WRONG.message


def test_refusal_does_not_prevent_the_next_attempt() -> None:
    cluster = FakeCluster().running()
    cluster.refusal = WRONG
    assert accepted(cluster).status == "False"
    cluster.vanish("circles-a1-n1")
    cluster.settle()
    assert cluster.job.status.attempt == 1
    # The admission policy that refused them may have changed.
    cluster.tick(60)
    decided = [cluster.step() for _ in range(2)]
    assert cluster.job.status.attempt == 2
    assert decided[-1].actions, "the pods are tried again"
    cluster.refusal = None
    assert accepted(cluster).status == "True"
    assert len(cluster.pods) == 2
