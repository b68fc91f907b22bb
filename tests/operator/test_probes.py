"""What the probes answer follows from fresh watches and finished passes, not from an open port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from finetune_operator.cluster.kube.client.client import KubeApi
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.operator import DEAD_SECONDS, STALE_SECONDS, OperatorOptions, Shared, Term
from finetune_operator.cluster.kube.watch.nodes import NodeBook
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.metrics import Metrics
from finetune_operator.settings import Settings

NOW = 10_000.0
Change = Callable[[Term], None]


def leading() -> Term:
    """One whose watches have just spoken and whose passes are finished."""
    clock = ServerClock()
    api = KubeApi(cast(Any, None), clock)
    nodes = NodeBook(lambda _: None)
    term = Term(Shared(OperatorOptions("one"), Settings(), Metrics(), api, clock, nodes, None))
    term.works = True
    for reflector in term._reflectors:
        reflector.fresh_at = reflector.tried_at = NOW
    return term


def silent(seconds: float) -> Change:
    """One of the watches has heard nothing for so long, and is made anew all the while."""

    def change(term: Term) -> None:
        term._reflectors[-1].fresh_at = NOW - seconds

    return change


def stuck(seconds: float) -> Change:
    """The task of one of the watches has shown no sign of life for so long."""

    def change(term: Term) -> None:
        term._reflectors[0].fresh_at = term._reflectors[0].tried_at = NOW - seconds

    return change


def hanging(seconds: float) -> Change:
    """A pass has been under way for so long."""

    def change(term: Term) -> None:
        term._workers._began_at[JobKey("team", "circles")] = NOW - seconds

    return change


def waiting(term: Term) -> None:
    """Its caches are not complete yet."""
    term.works = False


@pytest.mark.parametrize(
    ("change", "alive", "ready"),
    [
        (silent(0.0), True, True),
        (silent(STALE_SECONDS - 1), True, True),
        (silent(STALE_SECONDS + 1), True, False),
        (stuck(DEAD_SECONDS + 1), False, False),
        (hanging(DEAD_SECONDS - 1), True, True),
        (hanging(DEAD_SECONDS + 1), False, True),
        (waiting, True, False),
    ],
)
def test_what_the_probes_answer(change: Change, alive: bool, ready: bool) -> None:
    async def ask() -> tuple[bool, bool]:
        term = leading()
        change(term)
        return term.is_alive(NOW), term.is_fresh(NOW)

    assert asyncio.run(ask()) == (alive, ready)
