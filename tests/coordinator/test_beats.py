"""Which beats count."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.heartbeat import Heartbeat, RankReport, RankState
from finetune_operator.coordinator.beats import BeatBook, PodIdentity, mismatch

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
def test_the_newest_beat_is_kept_whatever_the_order(sequences: list[int]) -> None:
    book = BeatBook()
    for sequence in sequences:
        book.take(beat(sequence, step=sequence), NOON)
    kept = book.of("default", "circles")["uid-1"].beat
    assert kept.sequence == max(sequences)
    assert kept.ranks[0].step == max(sequences)


def test_only_news_wakes() -> None:
    book = BeatBook()
    assert book.take(beat(1, step=5), NOON)
    assert not book.take(beat(2, step=5), NOON + timedelta(seconds=5))
    assert book.of("default", "circles")["uid-1"].received_at == NOON + timedelta(seconds=5)
    assert book.take(beat(3, step=6), NOON)
    assert not book.take(beat(3, step=7), NOON)


def test_older_attempts_and_other_jobs_are_left_out() -> None:
    book = BeatBook()
    book.take(beat(pod_uid="old", attempt=1), NOON)
    book.take(beat(pod_uid="new", attempt=2), NOON)
    book.take(beat(pod_uid="other", job="squares"), NOON)
    seen = book.of("default", "circles", oldest_attempt=2)
    assert set(seen) == {"new"}
    assert set(book.of("default", "circles")) == {"new"}
    assert set(book.of("default", "squares")) == {"other"}


def test_what_was_given_out_does_not_change() -> None:
    book = BeatBook()
    book.take(beat(1), NOON)
    seen = book.of("default", "circles")
    book.take(beat(2, pod_uid="uid-2"), NOON)
    assert set(seen) == {"uid-1"}


@pytest.mark.parametrize(
    ("field", "claim"), [("namespace", "other"), ("job", "other"), ("pod", "other"), ("pod_uid", "other")]
)
def test_a_claim_that_the_token_does_not_prove(field: str, claim: str) -> None:
    sentence = mismatch(IDENTITY, beat().model_copy(update={field: claim}))
    assert sentence is not None
    assert "'other'" in sentence
    assert mismatch(IDENTITY, beat()) is None
