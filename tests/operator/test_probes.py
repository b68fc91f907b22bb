"""The probes depend on fresh watches and finished reconciles, not on an open port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from finetune_operator.cluster.kube.client.client import KubeApi
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.options import OperatorOptions
from finetune_operator.cluster.kube.term import (
    STALE_SECONDS,
    UNRESPONSIVE_SECONDS,
    LeaderTerm,
    ReplicaContext,
)
from finetune_operator.cluster.kube.watch.nodes import NodeStates
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.metrics import Metrics
from finetune_operator.settings import Settings

NOW = 10_000.0
Change = Callable[[LeaderTerm], None]


def leading_term() -> LeaderTerm:
    """Return a term whose watches have just received a response and whose reconciles are finished."""
    clock = ServerClock()
    api = KubeApi(cast(Any, None), clock)
    nodes = NodeStates(lambda _: None)
    term = LeaderTerm(ReplicaContext(OperatorOptions("one"), Settings(), Metrics(), api, clock, nodes, None))
    term.active = True
    for reflector in term._reflectors:
        reflector.last_response_at = reflector.last_activity_at = NOW
    return term


def no_response_for(seconds: float) -> Change:
    """Return a change: one of the watches has received no response for this long, but reconnects repeatedly."""

    def change(term: LeaderTerm) -> None:
        term._reflectors[-1].last_response_at = NOW - seconds

    return change


def no_activity_for(seconds: float) -> Change:
    """Return a change: the task of one of the watches has been inactive for this long."""

    def change(term: LeaderTerm) -> None:
        term._reflectors[0].last_response_at = term._reflectors[0].last_activity_at = NOW - seconds

    return change


def reconciling_for(seconds: float) -> Change:
    """Return a change: a reconcile has been running for this long."""

    def change(term: LeaderTerm) -> None:
        term._workers._began_at[JobKey("team", "circles")] = NOW - seconds

    return change


def starting(term: LeaderTerm) -> None:
    """Mark the caches as incomplete."""
    term.active = False


@pytest.mark.parametrize(
    ("change", "alive", "ready"),
    [
        (no_response_for(0.0), True, True),
        (no_response_for(STALE_SECONDS - 1), True, True),
        (no_response_for(STALE_SECONDS + 1), True, False),
        (no_activity_for(UNRESPONSIVE_SECONDS + 1), False, False),
        (reconciling_for(UNRESPONSIVE_SECONDS - 1), True, True),
        (reconciling_for(UNRESPONSIVE_SECONDS + 1), False, True),
        (starting, True, False),
    ],
)
def test_probe_results(change: Change, alive: bool, ready: bool) -> None:
    async def probe() -> tuple[bool, bool]:
        term = leading_term()
        change(term)
        return term.is_alive(NOW), term.is_fresh(NOW)

    assert asyncio.run(probe()) == (alive, ready)
