"""Times of the next reconcile: for every policy with a wake time, a situation in which that time decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_operator.plan import plan, registry
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import ObservedEviction, ObservedNode, Refusal
from tests.plan.fake_cluster import SETTINGS, FakeCluster, RankState, make_job, seconds
from tests.plan.scenarios import (
    FALLBACK,
    elastic_cluster,
    fixed_cluster,
    place,
    send_heartbeats,
    shrunk,
    spot_cluster,
)


def _acceptance() -> FakeCluster:
    """The API server refuses the pods until 60 s from now."""
    cluster = FakeCluster()
    cluster.step()
    cluster.refusal = Refusal("spec.podTemplate.x: a pod has no field x", hold_until=cluster.now + seconds(60))
    cluster.settle()
    return cluster


def _deadline() -> FakeCluster:
    return FakeCluster(make_job(activeDeadlineSeconds=45)).running()


def _hangs() -> FakeCluster:
    """The ranks stay at step 10 for 40 s of the 60 s in hangTimeout."""
    cluster = FakeCluster(make_job(recovery={"hangTimeout": "60s"})).running()
    cluster.train_to(10)
    cluster.settle()
    cluster.tick(40)
    cluster.train_to(10)
    cluster.settle()
    return cluster


def _stragglers() -> FakeCluster:
    """Pod 0 finished 59 s ago; the last heartbeat of pod 1 is older."""
    cluster = FakeCluster().running()
    cluster.train_to(100)
    cluster.settle()
    cluster.tick(1)
    cluster.beat(0, RankState.DONE, step=100)
    cluster.tick(1)
    cluster.exit(0, 0)
    cluster.settle()
    cluster.tick(59)
    cluster.settle()
    return cluster


def _endings() -> FakeCluster:
    """Rank 0 lost its peer; the cause is not certain yet."""
    cluster = FakeCluster().running()
    cluster.exit(0, ExitCode.FABRIC)
    cluster.settle()
    return cluster


def _gang() -> FakeCluster:
    """A creation failed; the next one is allowed in 20 s."""
    cluster = FakeCluster().created()
    cluster.vanish(cluster.pod(1).name)
    cluster.refusal = Refusal("exceeded quota")
    cluster.create_after = cluster.now + seconds(20)
    cluster.settle()
    return cluster


def _quota() -> FakeCluster:
    """A quota admits one of two pods."""
    cluster = FakeCluster().created()
    cluster.vanish(cluster.pod(1).name)
    cluster.refusal = Refusal("exceeded quota")
    cluster.step()
    return cluster


def _elastic() -> FakeCluster:
    """Three of four pods have had a node for 290 s of the default 300 s."""
    cluster = elastic_cluster()
    cluster.settle()
    place(cluster, 0, 1, 3)
    cluster.tick(290)
    send_heartbeats(cluster)
    cluster.settle()
    return cluster


def _spot() -> FakeCluster:
    """One of two pods has had a spot node for 590 s of the 600 s in fallbackAfter."""
    cluster = spot_cluster()
    cluster.tick(590)
    send_heartbeats(cluster)
    cluster.settle()
    return cluster


def _regroup() -> FakeCluster:
    """A standby pod is ready; the attempt has trained for 50 s of the 60 s that a regroup requires."""
    cluster = shrunk()
    place(cluster, 3)
    cluster.tick(50)
    send_heartbeats(cluster, step=50)
    cluster.settle()
    return cluster


def _reclassify() -> FakeCluster:
    """A job without failures left waits 60 s for the state of the nodes; 20 s are left."""
    cluster = FakeCluster(make_job(recovery={"maxFailures": 0})).running()
    cluster.beat_all()
    cluster.exit(0, ExitCode.FABRIC)
    cluster.step()
    cluster.tick(cluster.settings.cause_seconds)
    cluster.beat(1)
    cluster.step()
    cluster.tick(40 - cluster.settings.cause_seconds)
    cluster.settle()
    return cluster


def _attempts() -> FakeCluster:
    """Both ranks failed; the next attempt waits for the end of the back-off."""
    cluster = FakeCluster(settings=replace(FakeCluster().settings, failure_backoff_seconds=40.0)).running()
    cluster.exit(0, 1)
    cluster.exit(1, 1)
    cluster.settle()
    return cluster


def _phase() -> FakeCluster:
    """All ranks have sent a heartbeat; without another one they count as silent after 60 s."""
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.settle()
    return cluster


def _in_place() -> FakeCluster:
    """Survivors save during the notice of a peer; after 15 s of silence they are no longer kept."""
    cluster = fixed_cluster()
    cluster.change(1, disruption="DeletionByTaintManager")
    cluster.settle()
    return cluster


def _cleanup() -> FakeCluster:
    """Survivors save during the notice of a peer, which expires in 30 s."""
    cluster = FakeCluster(make_job(recovery={"noticeSeconds": 30})).running()
    cluster.change(1, disruption="DeletionByTaintManager")
    cluster.settle()
    return cluster


def _standby() -> FakeCluster:
    """A standby pod has waited for a spot node for 590 s of the 600 s in fallbackAfter."""
    cluster = shrunk(**FALLBACK)
    cluster.tick(590)
    send_heartbeats(cluster, step=500)
    cluster.settle()
    return cluster


def _ttl() -> FakeCluster:
    cluster = FakeCluster(make_job(ttlSecondsAfterFinished=30)).running()
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    return cluster


def _exports() -> FakeCluster:
    """A requested export failed; the next pod waits for the end of the back-off."""
    cluster = FakeCluster().running()
    cluster.request_export('{"id": "r1", "outputs": [{"format": "kohya", "to": "s3://models/kohya"}]}')
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    cluster.run_export()
    cluster.end_export(ExitCode.STORAGE)
    cluster.settle()
    return cluster


def _nodes() -> FakeCluster:
    """The control plane has lost the node of pod 1, whose last heartbeat is 10 s old."""
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.tick(10)
    cluster.settle()
    cluster.nodes["node-1"] = ObservedNode(lost=True)
    return cluster


@dataclass(frozen=True)
class WakeScenario:
    """A situation, and the delay until the next reconcile that a policy requests in it."""

    build: Callable[[], FakeCluster]
    delay_seconds: float | None
    """None: not a round number, because of jitter."""


def _queue_report() -> FakeCluster:
    """The job saved 40 s ago; an eviction costs more once it has trained for a minute since."""
    cluster = FakeCluster(make_job(queueName="gpus"), settings=replace(SETTINGS, kueue=True, kueue_priority_boost=True))
    cluster.settle()
    cluster.queue.admit("circles-1f0c3a2b", cluster.now)
    cluster.running()
    cluster.train_to(10, checkpoint=5)
    cluster.settle()
    cluster.tick(40)
    cluster.train_to(20, checkpoint=5)
    cluster.settle()
    return cluster


def _incomplete() -> FakeCluster:
    """One pod of the gang has had a node for 5 s; the other one does not fit."""
    cluster = FakeCluster(settings=replace(SETTINGS, gangs=True))
    cluster.settle()
    cluster.change(0, node="node-0", scheduled_at=cluster.now)
    cluster.change(1, waiting="Unschedulable: no node has room")
    cluster.tick(5)
    cluster.settle()
    return cluster


def _evictions() -> FakeCluster:
    """The gang saves because of an eviction request; the last report is 50 s old."""
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.evictions["e"] = ObservedEviction("e", cluster.pod(0).uid, active=True)
    cluster.settle()
    cluster.tick(50)
    cluster.train_to(10)
    cluster.settle()
    return cluster


SCENARIOS = {
    "evictions": WakeScenario(_evictions, 10),
    "incomplete": WakeScenario(_incomplete, None),
    "queue-report": WakeScenario(_queue_report, 20),
    "acceptance": WakeScenario(_acceptance, 60),
    "deadline": WakeScenario(_deadline, 45),
    "hangs": WakeScenario(_hangs, 20),
    "stragglers": WakeScenario(_stragglers, 1),
    "endings": WakeScenario(_endings, 10),
    "gang": WakeScenario(_gang, 20),
    "quota": WakeScenario(_quota, None),
    "elastic": WakeScenario(_elastic, 10),
    "spot": WakeScenario(_spot, 10),
    "regroup": WakeScenario(_regroup, 10),
    "reclassify": WakeScenario(_reclassify, 20),
    "attempts": WakeScenario(_attempts, None),
    "phase": WakeScenario(_phase, 60),
    "in-place": WakeScenario(_in_place, 15),
    "cleanup": WakeScenario(_cleanup, 30),
    "standby": WakeScenario(_standby, 10),
    "exports": WakeScenario(_exports, None),
    "ttl": WakeScenario(_ttl, 30),
    "nodes": WakeScenario(_nodes, 5),
}
"""By the name of the policy."""


def delay(cluster: FakeCluster) -> float | None:
    """Return the seconds until the next reconcile; None: there is none."""
    requeue_after = plan(cluster.job, cluster.observed(), cluster.now, cluster.settings).requeue_after
    return requeue_after.total_seconds() if requeue_after is not None else None


def test_every_policy_with_a_wake_time_has_a_scenario() -> None:
    with_wake = {policy.name for policy in registry.POLICIES if policy.wake is not Policy("none").wake}
    assert set(SCENARIOS) == with_wake, "add a scenario for each policy that defines `wake`"


@pytest.mark.parametrize("name", SCENARIOS)
def test_policy_decides_when_to_reconcile_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = SCENARIOS[name]
    cluster = scenario.build()
    wanted = delay(cluster)
    assert wanted is not None
    if scenario.delay_seconds is not None:
        assert wanted == pytest.approx(scenario.delay_seconds)
    others = tuple(
        replace(policy, wake=Policy("none").wake) if policy.name == name else policy for policy in registry.POLICIES
    )
    monkeypatch.setattr(registry, "POLICIES", others)
    without = delay(cluster)
    assert without is None or without > wanted, "another policy requests the same time, so the scenario proves nothing"
