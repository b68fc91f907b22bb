"""Intervals between heartbeats, and the store of the newest ones."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.heartbeat import Heartbeat, RankReport, RankState
from finetune_operator.cluster.kube.beats.interval import HeartbeatInterval
from finetune_operator.cluster.kube.beats.store import JobHeartbeats
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.listening import silence
from finetune_operator.plan.model.types import Observed
from finetune_operator.settings import Settings

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BEAT = Heartbeat(
    job="job",
    namespace="ns",
    job_uid="owner",
    pod="job-a1-n0",
    pod_uid="uid",
    attempt=1,
    node_rank=0,
    sequence=1,
    ranks=(RankReport(rank=0, state=RankState.TRAINING, step=1),),
)


def test_waiting_pods_together_stay_within_their_share_of_the_rate() -> None:
    interval = HeartbeatInterval(Settings(), beats_per_second=500)
    assert interval.choose_waiting_seconds(1.0, 3) == 1.0
    assert interval.choose_waiting_seconds(1.0, 500) == 4.0
    # Their ranks start only after their next heartbeat.
    assert interval.choose_waiting_seconds(1.0, 3000) == 10.0


def test_pods_send_fewer_heartbeats_while_jobs_wait_for_a_reconcile() -> None:
    interval = HeartbeatInterval(Settings(), beats_per_second=500)
    assert interval.choose_seconds(4000, 0.0) == 8.0
    assert interval.choose_seconds(4000, 1.0, busy=True) == interval.longest_seconds(1.0) == 20.0
    assert interval.choose_seconds(100, 2.0, busy=True) == 5.0


def test_interval_grows_with_the_number_of_pods_and_the_longest_one_is_remembered() -> None:
    interval = HeartbeatInterval(Settings(), beats_per_second=500)
    assert interval.choose_seconds(100, 0.0) == 5.0
    assert interval.choose_seconds(4000, 1.0) == interval.longest_seconds(1.0) == 8.0
    assert interval.choose_seconds(10**6, 2.0) == interval.longest_seconds(2.0) == 20.0
    # Pods use the previous interval until their next heartbeat.
    assert interval.choose_seconds(100, 3.0) == 5.0
    assert interval.longest_seconds(24.9) == 20.0
    assert interval.longest_seconds(25.1) == 5.0


@given(
    st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(0, 20_000), st.booleans()), min_size=1, max_size=20),
    st.floats(0.5, 60.0),
    st.floats(1.0, 200.0),
)
def test_no_pod_whose_reply_is_held_counts_as_silent(
    changes: list[tuple[float, int, bool]], beat_seconds: float, timeout_seconds: float
) -> None:
    settings = Settings(beat_seconds=beat_seconds, beat_timeout_seconds=timeout_seconds)
    interval = HeartbeatInterval(settings, beats_per_second=500)
    now = 0.0
    held_until: list[tuple[float, float]] = []
    for seconds, num_pods, busy in changes:
        now += seconds
        silent_after = silence(Observed(beat_seconds=interval.longest_seconds(now)), settings).total_seconds()
        # The heartbeat after a held reply arrives a little later.
        assert all(now - began <= silent_after for began, until in held_until if now <= until + 0.4)
        interval.choose_seconds(num_pods, now, busy=busy)
        held_until.append((now, now + interval.hold_seconds()))


def test_a_reply_is_held_for_two_heartbeats_and_longer_while_they_are_rare() -> None:
    interval = HeartbeatInterval(Settings(), beats_per_second=500)
    assert interval.hold_seconds() == 10.0
    interval.choose_seconds(4000, 0.0, busy=True)
    assert interval.hold_seconds() == 20.0


def test_waiting_pods_are_counted_until_they_stop_waiting() -> None:
    store = JobHeartbeats(lambda *_: None)
    for uid in ("a", "b", "c"):
        store.record(BEAT.model_copy(update={"pod_uid": uid, "waiting": True}), NOW)
    assert store.num_waiting == 3
    store.record(BEAT.model_copy(update={"pod_uid": "a", "sequence": BEAT.sequence + 1}), NOW)
    assert store.num_waiting == 2
    store.of_job(BEAT.namespace, BEAT.job, oldest_attempt=BEAT.attempt + 1)
    assert store.num_waiting == 0
    store.record(BEAT.model_copy(update={"waiting": True}), NOW)
    store.forget(JobKey(BEAT.namespace, BEAT.job))
    assert store.num_waiting == 0
