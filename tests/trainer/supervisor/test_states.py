"""The supervisor's transition table: every pair of state and input is a transition, or listed here as no transition."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from finetune_contract.heartbeat import Reply
from finetune_trainer.supervisor.states import (
    FINAL,
    FINAL_SUPERSEDED,
    REPORTED_AT_ONCE,
    TRANSITIONS,
    WITH_NOTICE,
    Input,
    State,
    inputs_of,
)

ENDS = {Input.ENDED_HOLDABLE, Input.ENDED_FINALLY}
REPLIES = {Input.SAVE_REQUEST, Input.PEER_LOSS, Input.NEW_WORLD, Input.NEWER_ATTEMPT}

IGNORED: dict[State, set[Input]] = {
    # The coordinator repeats these two with every heartbeat until all ranks run and can receive a signal.
    State.STARTING: {Input.SAVE_REQUEST, Input.PEER_LOSS},
    State.JOINING: set(),
    # No rank runs that could save or end.
    State.STANDBY: {Input.SAVE_REQUEST, Input.PEER_LOSS},
    State.WAITING: {Input.SAVE_REQUEST, Input.PEER_LOSS},
    State.RUNNING: set(),
    # Repetitions of the input that led to the state.
    State.SAVING: {Input.SAVE_REQUEST},
    State.PEER_LOST: {Input.PEER_LOSS},
    # The ranks end already. All of them may have been started in between.
    State.RESTARTING: {Input.SAVE_REQUEST, Input.PEER_LOSS, Input.RANKS_STARTED},
    State.STOPPING: {Input.PREEMPTION_NOTICE, Input.SAVE_REQUEST, Input.PEER_LOSS, Input.RANKS_STARTED},
    State.SUPERSEDED: {Input.NEWER_ATTEMPT, Input.SAVE_REQUEST, Input.RANKS_STARTED},
    State.SUPERSEDED_PEER_LOST: {*REPLIES, Input.RANKS_STARTED},
    State.SUPERSEDED_STOPPING: {*REPLIES, Input.PREEMPTION_NOTICE, Input.RANKS_STARTED},
    # The exit code of the pod is decided, except that a newer attempt supersedes it.
    State.ENDED: {Input.PREEMPTION_NOTICE, *REPLIES - {Input.NEWER_ATTEMPT}},
    State.ENDED_AFTER_NOTICE: {Input.PREEMPTION_NOTICE, Input.SAVE_REQUEST, Input.PEER_LOSS},
    State.ENDED_SUPERSEDED: {Input.PREEMPTION_NOTICE, *REPLIES},
    State.ENDED_SUPERSEDED_AFTER_NOTICE: {Input.PREEMPTION_NOTICE, *REPLIES},
}
"""Inputs that can arrive in a state and change nothing."""

IMPOSSIBLE: dict[State, set[Input]] = {
    **{state: {Input.HOLD_EXPIRED} for state in State if state is not State.WAITING},
    # A standby pod has no ranks: none are started, and none can fail.
    State.STANDBY: {Input.HOLD_EXPIRED, Input.RANKS_STARTED, Input.ENDED_FINALLY},
    # Its ranks are started in another state. A fault of a GPU ends the pod.
    State.JOINING: {Input.HOLD_EXPIRED, Input.RANKS_STARTED, Input.ENDED_HOLDABLE},
    # Ends are read after all ranks have been started.
    State.STARTING: {Input.HOLD_EXPIRED, *ENDS},
    State.RUNNING: {Input.HOLD_EXPIRED, Input.RANKS_STARTED},
    State.SAVING: {Input.HOLD_EXPIRED, Input.RANKS_STARTED},
    State.PEER_LOST: {Input.HOLD_EXPIRED, Input.RANKS_STARTED},
    State.WAITING: {Input.RANKS_STARTED, *ENDS},
    **{state: {Input.HOLD_EXPIRED, Input.RANKS_STARTED, *ENDS} for state in FINAL},
}
"""Inputs that cannot arrive in a state."""

PAIRS = list(product(State, Input))


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=str)
def test_every_pair_is_a_transition_or_listed_as_none(state: State, event: Input) -> None:
    kinds = [(state, event) in TRANSITIONS, event in IGNORED[state], event in IMPOSSIBLE[state]]
    assert kinds.count(True) == 1, f"{state}, {event}: transition, ignored, impossible = {kinds}"


def test_every_state_can_be_reached_and_leads_to_the_end() -> None:
    for begin in (State.STANDBY, State.JOINING, State.STARTING):
        reached = reachable(begin)
        assert reached == set(State) - {State.STANDBY, State.JOINING} | {begin}
    assert all(reachable(state) & FINAL for state in State)


def reachable(begin: State) -> set[State]:
    """All states that follow from one, and itself."""
    reached, pending = {begin}, [begin]
    while pending:
        state = pending.pop()
        following = {target for (source, _), target in TRANSITIONS.items() if source is state} - reached
        reached |= following
        pending += following
    return reached


def test_a_notice_and_a_newer_attempt_are_never_forgotten() -> None:
    superseded = {state for state in State if "SUPERSEDED" in state.name}
    assert superseded & FINAL == FINAL_SUPERSEDED
    for (state, _), target in TRANSITIONS.items():
        assert state not in WITH_NOTICE or target in WITH_NOTICE, f"{state} -> {target}"
        assert state not in superseded or target in superseded, f"{state} -> {target}"
        assert state not in FINAL or target in FINAL, f"{state} -> {target}"


def test_a_notice_is_accepted_wherever_ranks_run_or_may_run() -> None:
    for state in set(State) - FINAL - WITH_NOTICE:
        assert TRANSITIONS[state, Input.PREEMPTION_NOTICE] in WITH_NOTICE


def test_changes_that_the_heartbeat_shows_are_sent_at_once() -> None:
    assert FINAL | WITH_NOTICE | {State.WAITING} <= REPORTED_AT_ONCE


WORLD = {"attempt": 4, "nodeRank": 0, "numNodes": 1, "masterAddr": "here", "masterPort": 1}
HELD: list[tuple[dict[str, Any], tuple[Input, ...], tuple[Input, ...]]] = [
    # Reply; inputs for a pod that can be held; inputs for one that cannot.
    ({}, (), ()),
    ({"attempt": 3}, (), ()),
    ({"attempt": 4}, (Input.NEWER_ATTEMPT,), (Input.NEWER_ATTEMPT,)),
    ({"attempt": 4, "world": WORLD}, (Input.NEW_WORLD,), (Input.NEW_WORLD,)),
    ({"attempt": 3, "world": {**WORLD, "attempt": 3}}, (), ()),
    ({"attempt": 3, "world": {**WORLD, "attempt": 3, "masterAddr": "moved"}}, (Input.NEW_WORLD,), (Input.NEW_WORLD,)),
    ({"attempt": 3, "world": {**WORLD, "attempt": 2, "masterAddr": "moved"}}, (), ()),
    ({"order": "SaveAndStop"}, (Input.SAVE_REQUEST,), (Input.PREEMPTION_NOTICE,)),
    ({"peerLost": True}, (Input.PEER_LOSS,), ()),
    ({"order": "SaveAndStop", "peerLost": True}, (Input.SAVE_REQUEST,), (Input.PREEMPTION_NOTICE,)),
    ({"attempt": 4, "peerLost": True}, (Input.NEWER_ATTEMPT, Input.PEER_LOSS), (Input.NEWER_ATTEMPT,)),
]


@pytest.mark.parametrize(("reply", "held", "not_held"), HELD)
def test_inputs_of_a_reply(reply: dict[str, Any], held: tuple[Input, ...], not_held: tuple[Input, ...]) -> None:
    parsed = Reply.model_validate(reply)
    assert inputs_of(parsed, 3, "here", can_be_held=True) == held
    assert inputs_of(parsed, 3, "here", can_be_held=False) == not_held
