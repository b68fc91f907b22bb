"""A lost peer whose machine turns out to be lost: put right in the ledger, without having waited for it."""

from __future__ import annotations

from dataclasses import replace

from finetune_contract.exit_codes import ExitCode
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.plan import plan
from finetune_operator.plan.model.types import ObservedNode
from tests.plan.harness import World, make_job


def failed_fabric(max_failures: int = 3) -> World:
    """Rank 0 lost its peer; rank 1's pod has just beaten, and nobody says anything."""
    world = World(make_job(recovery={"maxFailures": max_failures})).running()
    world.beat_all()
    world.exit(0, ExitCode.FABRIC)
    world.step()
    world.tick(world.settings.cause_seconds)
    world.beat(1)
    world.step()
    assert world.job.status.attempts[0].reason == Reason.FABRIC_ERROR
    return world


def hear_of_node(world: World) -> None:
    """The control plane misses the node of rank 1."""
    observed = replace(world.observed(), nodes={"node-1": ObservedNode(lost=True)})
    world.job = world.job.model_copy(update={"status": plan(world.job, observed, world.now, world.settings).status})


def test_the_restart_does_not_wait_and_the_ledger_is_put_right() -> None:
    world = failed_fabric()
    assert world.job.status.failures == 1
    world.tick(20)
    world.settle()
    assert world.job.status.attempt == 2
    world.tick(20)
    hear_of_node(world)
    status = world.job.status
    assert (status.preemptions, status.failures, status.tally.failures_since_checkpoint) == (1, 0, 0)
    first = status.attempts[0]
    assert (first.reason, first.node, first.rank) == (Reason.NODE_LOST, "node-1", 1)


def test_a_job_whose_budget_is_spent_waits_for_the_word_of_its_nodes() -> None:
    world = failed_fabric(max_failures=0)
    assert world.job.status.phase is Phase.RECOVERING
    world.tick(30)
    world.settle()
    assert (world.job.status.attempt, world.job.status.phase) == (1, Phase.RECOVERING)
    hear_of_node(world)
    assert world.job.status.preemptions == 1
    world.settle()
    assert world.job.status.attempt == 2


def test_and_fails_where_none_comes() -> None:
    world = failed_fabric(max_failures=0)
    decided = world.settle()
    assert decided.requeue_after is not None
    world.tick(60)
    world.settle()
    assert (world.job.status.phase, world.job.status.reason) == (Phase.FAILED, Reason.MAX_FAILURES_EXCEEDED)


def test_a_node_that_is_lost_much_later_is_another_matter() -> None:
    world = failed_fabric()
    world.tick(3600)
    hear_of_node(world)
    assert world.job.status.failures == 1


def test_a_pod_that_is_gone_is_named_with_its_node() -> None:
    world = World().running()
    world.vanish("circles-a1-n1")
    world.step()
    entry = world.job.status.attempts[0]
    assert (entry.reason, entry.node) == (Reason.POD_LOST, "node-1")
    assert entry.pod_nodes is None
