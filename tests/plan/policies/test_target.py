"""Edits of the steps, epochs and outputs of a running job: all ranks save, and continue with the edit in their pods."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.heartbeat import Order
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.manifests import build_target
from finetune_operator.plan.model.types import PodPhase
from tests.plan.fake_cluster import FakeCluster
from tests.plan.scenarios import fixed_cluster

LONGER: dict[str, Any] = {"training": {"method": "LoRA", "steps": 200}}
ELSEWHERE: dict[str, Any] = {"outputs": [{"format": "kohya", "to": "lora"}]}


def environment(cluster: FakeCluster, name: str) -> dict[str, str]:
    (container,) = cluster.manifests[name]["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


@pytest.mark.parametrize("edit", [LONGER, ELSEWHERE])
def test_ranks_save_and_continue_with_the_edit_in_the_same_pods(edit: dict[str, Any]) -> None:
    cluster = fixed_cluster(2)
    pods = set(cluster.pods)
    cluster.train_to(10)
    cluster.settle()
    cluster.edit(**edit)
    cluster.settle()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as) == (Reason.TARGET_EDITED, None)
    beats = [received.beat for received in cluster.beats.values()]
    assert {cluster.reply(beat).order for beat in beats} == {Order.SAVE_AND_STOP}
    for node_rank in range(2):
        cluster.beat(node_rank, step=10, waiting=True)
    cluster.settle()
    assert (cluster.job.status.attempt, set(cluster.pods)) == (2, pods)
    worlds = [cluster.reply(received.beat).world for received in cluster.beats.values()]
    target = build_target(cluster.job.spec).to_json()
    assert [world and world.target for world in worlds] == [target] * 2
    assert (cluster.job.status.failures, cluster.job.status.preemptions) == (0, 0)


def test_pods_that_are_created_after_the_edit_contain_it() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.settle()
    cluster.edit(**LONGER)
    cluster.settle()
    for node_rank in range(2):
        cluster.exit(node_rank, 75)
    cluster.settle()
    cluster.tick(60)
    cluster.settle()
    assert cluster.job.status.attempt == 2
    target = json.loads(environment(cluster, "circles-a2-n0")["FINETUNE_TARGET"])
    assert target == {"steps": 200, "outputs": []}


def test_a_job_that_has_finished_the_old_steps_continues_if_they_were_raised_before() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(99)
    cluster.settle()
    cluster.edit(**LONGER)
    cluster.step()
    assert cluster.job.status.attempts[0].reason == Reason.TARGET_EDITED
    for pod in list(cluster.pods.values()):
        cluster.pods[pod.name] = replace(pod, phase=PodPhase.SUCCEEDED, exit_code=0)
    cluster.settle()
    cluster.tick(60)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.attempt) != (Phase.SUCCEEDED, 1)
    assert cluster.job.status.attempt == 2


@pytest.mark.parametrize("edit", [{}, {"recovery": {"maxFailures": 7}}])
def test_other_edits_do_not_interrupt_the_gang(edit: dict[str, Any]) -> None:
    cluster = fixed_cluster(2)
    cluster.train_to(10)
    cluster.settle()
    cluster.edit(**edit)
    cluster.settle()
    assert (cluster.job.status.attempt, cluster.job.status.attempts[0].reason) == (1, None)
