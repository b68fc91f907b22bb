"""Accepted or not: with all the sentences, once for each generation, and with nothing made of what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.job import Condition, Phase
from finetune_operator.api.words import ConditionType, Reason
from finetune_operator.plan.conditions import find
from finetune_operator.settings import Settings
from tests.plan.world import SETTINGS, START, World, make_job

CPU = {"accelerator": "cpu"}
LORA = {"method": "LoRA", "steps": 10}

REFUSED = [
    ({"queueName": "gpus"}, Reason.NOT_SUPPORTED, "spec.queueName"),
    ({"training": LORA | {"epochs": 3}}, Reason.INVALID_SPEC, "spec.training"),
    ({"topology": CPU, "training": LORA | {"precision": "fp16"}}, Reason.INVALID_SPEC, "precision"),
    ({"podTemplate": {"spec": {"containers": [{"image": "mine"}]}}}, Reason.INVALID_SPEC, "spec.podTemplate"),
]


def accepted(world: World) -> Condition:
    world.settle()
    condition = find(world.job.status, ConditionType.ACCEPTED)
    assert condition is not None
    return condition


@pytest.mark.parametrize(("spec", "reason", "field"), REFUSED)
def test_refused_with_a_sentence_and_nothing_made(spec: dict[str, Any], reason: Reason, field: str) -> None:
    world = World(make_job(**spec))
    condition = accepted(world)
    assert (condition.status, condition.reason) == ("False", reason)
    assert field in condition.message
    assert ";" in condition.message, "says what to write instead"
    status = world.job.status
    assert (status.phase, status.reason, status.message) == (Phase.PENDING, reason, condition.message)
    assert (status.attempt, world.pods, world.services, world.configs) == (0, {}, set(), set())


def test_a_real_cluster_wants_storage() -> None:
    world = World(settings=Settings(coordinator_url="https://coordinator"))
    assert "spec.checkpoint.storage" in accepted(world).message
    claim = {"persistentVolumeClaim": {"claimName": "shared"}}
    world = World(make_job(checkpoint={"storage": claim}), settings=world.settings)
    assert accepted(world).status == "True"


@pytest.mark.parametrize("spot", [{}, {"fallbackAfter": "30m"}])
def test_spot_is_accepted_and_rendered(spot: dict[str, str]) -> None:
    world = World(make_job(recovery={"spot": spot}))
    assert accepted(world).status == "True"
    assert len(world.pods) == 2


def test_all_that_is_wrong_is_said_at_once() -> None:
    world = World(make_job(queueName="gpus"), settings=Settings(coordinator_url="https://coordinator"))
    message = accepted(world).message
    assert "queueName" in message
    assert "checkpoint.storage" in message


def test_a_corrected_spec_is_accepted() -> None:
    world = World(make_job(queueName="gpus"))
    accepted(world)
    world.tick(60)
    corrected = make_job().model_copy(update={"status": world.job.status})
    world.job = corrected.model_copy(
        update={"metadata": corrected.metadata.model_copy(update={"generation": 2})},
    )
    condition = accepted(world)
    assert (condition.status, condition.observed_generation) == ("True", 2)
    assert condition.last_transition_time == world.now
    assert world.job.status.observed_generation == 2
    assert world.job.status.attempt == 1


def test_an_edit_that_is_refused_lets_the_attempt_go_on_but_not_the_next_one() -> None:
    world = World().running()
    edited = make_job(queueName="gpus").model_copy(update={"status": world.job.status})
    world.job = edited.model_copy(update={"metadata": edited.metadata.model_copy(update={"generation": 2})})
    assert accepted(world).status == "False"
    assert len(world.pods) == 2
    world.pods.clear()
    world.settle()
    assert (world.job.status.attempt, world.pods) == (1, {})
    assert world.job.status.phase is Phase.PENDING


def test_accepted_since_the_first_look() -> None:
    world = World(settings=SETTINGS)
    accepted(world)
    world.tick(5)
    assert accepted(world).last_transition_time == START
