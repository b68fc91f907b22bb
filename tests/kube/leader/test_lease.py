"""Rules of the lease without a server: two replicas, clocks that differ, renewals that fail."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.cluster.kube.leader.lease import LeaseState

SECONDS = 15.0


def test_free_lease_is_acquired_and_used_until_before_its_end() -> None:
    state = LeaseState("me", SECONDS)
    assert not state.may_acquire(0.0), "nothing was read yet"
    state.observe("", "", 0.0)
    assert state.may_acquire(0.0)
    assert not state.may_write(0.0)
    state.record_renewal(1.0)
    assert state.may_write(10.9)
    assert not state.may_write(11.1)


def test_lease_of_another_replica_is_acquired_after_its_duration_without_a_change() -> None:
    state = LeaseState("me", SECONDS)
    state.observe("other", "1", 0.0)
    state.observe("other", "1", 14.0)
    assert not state.may_acquire(14.9)
    state.observe("other", "2", 14.9)
    assert not state.may_acquire(29.8)
    state.observe("other", "2", 29.9)
    assert state.may_acquire(29.9)


def test_released_lease_is_acquired_at_once() -> None:
    state = LeaseState("me", SECONDS)
    state.observe("other", "1", 0.0)
    state.observe("", "2", 1.0)
    assert state.may_acquire(1.0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0.0, 10.0), st.booleans()), max_size=60))
def test_two_replicas_never_write_at_the_same_time(steps: list[tuple[str, float, bool]]) -> None:
    """Each replica has its own clock; the server accepts a write only for the version that was read."""
    skew = {"a": 0.0, "b": 300.0}
    states = {name: LeaseState(name, SECONDS) for name in skew}
    holder, version, read = "", 0, {"a": -1, "b": -1}
    now = 1000.0
    for name, pause, fails in steps:
        now += pause
        state, local_time = states[name], now + skew[name]
        if fails:
            continue
        if not state.may_write(local_time):
            state.observe(holder, str(version), local_time)
            read[name] = version
            if not state.may_acquire(local_time):
                continue
        if read[name] == version:
            version += 1
            holder, read[name] = name, version
            state.record_renewal(local_time)
            assert state.may_write(local_time)
        else:
            state.record_loss()
        assert not (states["a"].may_write(now) and states["b"].may_write(now + skew["b"]))
