"""Clearing an attempt: who is deleted, when, and with how much grace."""

from __future__ import annotations

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_operator.plan.model.types import DeletePod
from tests.plan.harness import RankState, World, make_job


def deletions(world: World) -> list[tuple[str, int | None]]:
    return [(a.name[-2:], a.grace_seconds) for a in world.step().actions if isinstance(a, DeletePod)]


def noticed(**spec: object) -> World:
    """Rank 1's pod is taken away with 30 s of notice."""
    world = World(make_job(**({"recovery": {"noticeSeconds": 30}} | spec))).running()
    world.tick(1)
    world.change(1, disruption="TerminationByKubelet")
    world.delete("circles-a1-n1", world.pod(1).uid, None)
    return world


def test_after_a_sudden_loss_the_survivors_go_at_once() -> None:
    world = World().running()
    world.vanish("circles-a1-n1")
    assert deletions(world) == [("n0", 2)]
    assert deletions(world) == []


def test_after_a_failure_the_survivors_and_the_failed_one_go() -> None:
    world = World().running()
    world.exit(1, 1)
    assert deletions(world) == [("n0", 2), ("n1", 2)]


def test_on_notice_the_survivors_are_left_to_save() -> None:
    world = noticed()
    assert deletions(world) == []
    world.tick(2)
    world.exit(0, ExitCode.SAVED)
    assert deletions(world) == [("n0", 2)]
    world.exit(1, ExitCode.SAVED)
    world.vanish("circles-a1-n1")
    world.settle()
    assert world.job.status.attempt == 2
    assert world.job.status.preemptions == 1


def test_when_the_notice_is_over_the_survivors_go() -> None:
    world = noticed()
    decided = world.step()
    assert decided.requeue_after is not None
    assert decided.requeue_after.total_seconds() == 30
    world.tick(29)
    assert deletions(world) == []
    world.tick(1)
    assert deletions(world) == [("n0", 2)]
    world.tick(2)
    world.settle()
    assert world.job.status.attempt == 2


def test_a_notice_without_a_deletion_lasts_as_long_as_any_does() -> None:
    world = World(make_job(recovery={"noticeSeconds": 30})).running()
    world.change(1, disruption="DeletionByTaintManager")
    world.step()
    world.tick(29)
    assert deletions(world) == []
    world.tick(1)
    assert deletions(world) == [("n0", 2), ("n1", 2)]


@pytest.mark.parametrize("code", [1, ExitCode.FABRIC, ExitCode.STORAGE, 137])
def test_when_a_rank_ends_badly_on_notice_nobody_can_save_any_more(code: int) -> None:
    world = noticed()
    world.step()
    world.exit(0, code)
    world.change(1, deleted_at=None, disruption="TerminationByKubelet")
    assert deletions(world) == [("n0", 2), ("n1", 2)]


def test_a_longer_deletion_is_shortened_and_a_shorter_one_left_alone() -> None:
    world = World(make_job(recovery={"noticeSeconds": 60})).running()
    world.delete("circles-a1-n0", world.pod(0).uid, None)
    world.vanish("circles-a1-n1")
    assert deletions(world) == [("n0", 2)]
    assert deletions(world) == []


def test_running_pods_of_a_job_that_failed_go_and_finished_ones_stay_for_their_logs() -> None:
    world = World().running()
    world.exit(1, ExitCode.CONFIG)
    assert deletions(world) == [("n0", 2)]
    world.tick(2)
    world.settle()
    assert list(world.pods) == ["circles-a1-n1"]


def test_where_the_pod_with_the_notice_is_gone_nobody_waits_for_the_rest_of_it() -> None:
    world = noticed()
    world.step()
    world.vanish("circles-a1-n1")
    assert deletions(world) == [("n0", 2)]


def test_but_a_save_that_is_under_way_is_waited_for() -> None:
    world = noticed()
    world.beat(0, RankState.SAVING, step=10, restored_step=0)
    world.step()
    world.vanish("circles-a1-n1")
    assert deletions(world) == []


def test_where_a_rank_fails_while_the_job_is_suspended_the_others_have_nothing_left_to_save() -> None:
    world = World().running()
    spec = world.job.spec.model_copy(update={"suspend": True})
    world.job = world.job.model_copy(update={"spec": spec})
    assert deletions(world) == [("n0", None), ("n1", None)]
    world.exit(1, 1)
    assert deletions(world) == [("n0", 2)]
