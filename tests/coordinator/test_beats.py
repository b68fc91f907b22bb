"""Storage of the newest heartbeats."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.heartbeat import Heartbeat, RankReport, RankState
from finetune_operator.coordinator.beats import HeartbeatStore, PodIdentity, find_mismatch

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
IDENTITY = PodIdentity("default", "circles", "circles-a1-n0", "uid-1")


def beat(sequence: int = 1, step: int = 0, **changes: object) -> Heartbeat:
    values = {
        "job": "circles",
        "namespace": "default",
        "job_uid": "job-1",
        "pod": "circles-a1-n0",
        "pod_uid": "uid-1",
        "attempt": 1,
        "node_rank": 0,
        "sequence": sequence,
        "ranks": (RankReport(rank=0, state=RankState.TRAINING, step=step),),
    }
    return Heartbeat.model_validate(values | changes)


@given(st.lists(st.integers(0, 50), min_size=1))
def test_newest_heartbeat_is_stored_in_any_order(sequences: list[int]) -> None:
    store = HeartbeatStore()
    for sequence in sequences:
        store.record(beat(sequence, step=sequence), NOON)
    newest = store.of_job("default", "circles")["uid-1"].beat
    assert newest.sequence == max(sequences)
    assert newest.ranks[0].step == max(sequences)


def test_only_changes_wake_the_job() -> None:
    store = HeartbeatStore()
    assert store.record(beat(1, step=5), NOON)
    assert not store.record(beat(2, step=5), NOON + timedelta(seconds=5))
    assert store.of_job("default", "circles")["uid-1"].received_at == NOON + timedelta(seconds=5)
    assert store.record(beat(3, step=6), NOON)
    assert not store.record(beat(3, step=7), NOON)


def test_older_attempts_and_other_jobs_are_excluded() -> None:
    store = HeartbeatStore()
    store.record(beat(pod_uid="old", attempt=1), NOON)
    store.record(beat(pod_uid="new", attempt=2), NOON)
    store.record(beat(pod_uid="other", job="squares"), NOON)
    seen = store.of_job("default", "circles", oldest_attempt=2)
    assert set(seen) == {"new"}
    assert set(store.of_job("default", "circles")) == {"new"}
    assert set(store.of_job("default", "squares")) == {"other"}


def test_returned_mapping_does_not_change() -> None:
    store = HeartbeatStore()
    store.record(beat(1), NOON)
    seen = store.of_job("default", "circles")
    store.record(beat(2, pod_uid="uid-2"), NOON)
    assert set(seen) == {"uid-1"}


@pytest.mark.parametrize(
    ("field", "claim"), [("namespace", "other"), ("job", "other"), ("pod", "other"), ("pod_uid", "other")]
)
def test_heartbeat_field_that_the_token_does_not_confirm_is_refused(field: str, claim: str) -> None:
    message = find_mismatch(IDENTITY, beat().model_copy(update={field: claim}))
    assert message is not None
    assert "'other'" in message
    assert find_mismatch(IDENTITY, beat()) is None
