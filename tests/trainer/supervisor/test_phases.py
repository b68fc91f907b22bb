"""Durations of the phases of a start."""

from __future__ import annotations

import time

from finetune_contract import environment
from finetune_trainer.phases import Phases, StartPhase


def test_each_phase_begins_with_the_end_of_the_previous_one() -> None:
    now = [110.0]
    phases = Phases(began=100.0, clock=lambda: now[0])
    phases.end(StartPhase.IMPORTS)
    now[0] = 110.5
    phases.end(StartPhase.RENDEZVOUS)
    now[0] = 113.0
    phases.end(StartPhase.FIRST_STEP)
    assert phases.seconds == {StartPhase.IMPORTS: 10.0, StartPhase.RENDEZVOUS: 0.5, StartPhase.FIRST_STEP: 2.5}
    assert phases.total == 13.0
    assert phases.describe() == "first step after 13.0 s: imports 10.0 s, rendezvous 0.5 s, first step 2.5 s"


def test_a_start_begins_with_the_order_of_the_supervisor() -> None:
    assert Phases.of({environment.RANK_ORDERED: "12.5"}).began == 12.5
    before = time.monotonic()
    assert before <= Phases.of({}).began <= time.monotonic()
