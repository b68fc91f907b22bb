"""Only the time in which the operator listened counts as silence of a pod."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.listening import extend, unheard
from finetune_operator.plan.model.types import DeafPeriod, Observed, ObservedNode
from tests.plan.fake_cluster import START, FakeCluster, seconds
from tests.plan.policies.test_stragglers import done_but_one
from tests.plan.scenarios import fixed_cluster, wait_for_peers

Wait = Callable[[FakeCluster, float], None]


def _listening(cluster: FakeCluster, number: float) -> None:
    cluster.now += seconds(number)


WAITS = {True: _listening, False: FakeCluster.pause}
"""Whether the operator listened during a wait, and how to wait."""


@pytest.mark.parametrize("listened", WAITS)
def test_survivors_are_kept_after_a_pause_of_the_operator(listened: bool) -> None:
    cluster = fixed_cluster()
    wait_for_peers(cluster, 0, 2)
    WAITS[listened](cluster, 60)
    cluster.vanish(cluster.pod(1).name)
    cluster.settle()
    assert cluster.job.status.attempts[-1].pod_attempts == (() if listened else (1, 2, 1))


@pytest.mark.parametrize("listened", WAITS)
def test_pod_on_a_node_without_status_is_not_lost_because_of_a_pause(listened: bool) -> None:
    cluster = fixed_cluster()
    WAITS[listened](cluster, 60)
    node = cluster.pod(1).node
    assert node is not None
    cluster.nodes[node] = ObservedNode(lost=True)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason == (Reason.NODE_LOST if listened else None)


@pytest.mark.parametrize("listened", WAITS)
def test_last_pod_is_not_lost_because_of_a_pause(listened: bool) -> None:
    cluster = done_but_one()
    WAITS[listened](cluster, 61)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason == (Reason.NODE_LOST if listened else None)


@pytest.mark.parametrize("listened", WAITS)
def test_pause_is_not_reported_as_silence(listened: bool) -> None:
    cluster = fixed_cluster()
    WAITS[listened](cluster, 70)
    cluster.settle()
    assert ("has sent no heartbeat" in (cluster.job.status.message or "")) == listened


def test_peer_that_reports_late_because_of_a_pause_is_not_the_lost_one() -> None:
    cluster = fixed_cluster()
    cluster.tick(1)
    wait_for_peers(cluster, 0)
    cluster.settle()
    cluster.pause(11)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason is None
    cluster.now += seconds(10)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason == Reason.NODE_LOST


def test_only_the_part_after_a_heartbeat_counts() -> None:
    def at(number: float) -> DeafPeriod:
        return DeafPeriod(START + seconds(number), START + seconds(number + 10))

    observed = Observed(deaf=(at(-30), at(-4), at(20)))
    assert unheard(START, observed) == timedelta(seconds=6 + 10)
    assert extend(START, seconds(15), observed) == START + seconds(31)
    assert extend(START, seconds(15), Observed()) == START + seconds(15)
    assert extend(START, seconds(15), observed, at_most=seconds(5)) == START + seconds(20)
