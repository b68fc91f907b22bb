"""Accepted or not: with all the sentences, once for each generation, and with nothing made of what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import Condition
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.conditions import find
from finetune_operator.plan.model.types import Refusal
from finetune_operator.settings import Settings
from tests.plan.harness import SETTINGS, START, World, make_job, seconds

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


WRONG = Refusal("spec.podTemplate.x: a pod has no field x; leave it out", hold_until=START + seconds(60))


def begun() -> World:
    """A job whose first attempt has begun; its pods are to be created next."""
    world = World()
    world.step()
    assert world.job.status.attempt == 1
    assert not world.pods
    return world


def edit(world: World) -> None:
    """Another spec: what was refused of the old one says nothing of it."""
    meta = world.job.metadata.model_copy(update={"generation": world.job.metadata.generation + 1})
    world.job, world.refusal = world.job.model_copy(update={"metadata": meta}), None


def test_pods_that_are_wrong_are_held_back_and_tried_once_in_a_while() -> None:
    world = begun()
    world.refusal = WRONG
    decided = world.settle()
    condition = accepted(world)
    assert (condition.status, condition.reason, condition.message) == ("False", Reason.FAILED_CREATE, WRONG.message)
    assert world.job.status.phase is Phase.PENDING
    assert decided.requeue_after == seconds(60)
    assert not decided.actions
    world.tick(60)
    again = world.decide()
    assert len(again.actions) >= 2
    assert again.status == world.job.status, "nothing is written until the cluster has answered"


def test_an_edit_lets_the_attempt_go_on() -> None:
    world = begun()
    world.refusal = WRONG
    world.settle()
    edit(world)
    assert accepted(world).status == "True"
    assert (world.job.status.attempt, len(world.pods)) == (1, 2)


def test_what_was_refused_is_not_forgotten_with_the_operator_that_heard_it() -> None:
    world = begun()
    world.refusal = WRONG
    world.settle()
    world.refusal = None
    decided = world.decide()
    assert decided.status == world.job.status
    assert len(decided.actions) >= 2, "it is tried"
    # This time they are taken.
    assert accepted(world).status == "True"


def test_a_quota_keeps_a_job_waiting_and_does_not_refuse_it() -> None:
    world = begun()
    world.refusal = Refusal("Pod circles-a1-n0 was refused: exceeded quota")
    decided = world.decide()
    assert decided.actions, "it is tried again"
    assert (decided.status.phase, decided.status.reason) == (Phase.QUEUED, Reason.FAILED_CREATE)
    assert decided.status.message == world.refusal.message
    condition = find(decided.status, ConditionType.ACCEPTED)
    assert condition is not None
    assert condition.status == "True"


def test_an_edit_that_makes_no_pods_leaves_those_that_run_alone() -> None:
    world = World()
    world.settle()
    world.run_all()
    world.settle()
    edit(world)
    world.settle()
    world.vanish("circles-a1-n1")
    # The next attempt's pods are not taken.
    while world.job.status.attempt < 2:
        world.step()
        world.tick(1)
    world.refusal = Refusal(WRONG.message, hold_until=world.now + seconds(60))
    world.settle()
    assert accepted(world).status == "False"
    assert world.job.status.phase is Phase.RECOVERING
    assert world.job.status.message == WRONG.message


def test_a_refusal_does_not_keep_the_next_attempt_from_being_tried() -> None:
    world = World().running()
    world.refusal = WRONG
    assert accepted(world).status == "False"
    world.vanish("circles-a1-n1")
    world.settle()
    assert world.job.status.attempt == 1
    # A policy that refused them may have changed.
    world.tick(60)
    decided = [world.step() for _ in range(2)]
    assert world.job.status.attempt == 2
    assert decided[-1].actions, "they are tried"
    world.refusal = None
    assert accepted(world).status == "True"
    assert len(world.pods) == 2
