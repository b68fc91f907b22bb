"""The lease's rules without a server: two replicas, clocks that run apart, renewals that fail."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.cluster.kube.leader.lease import Tenure

SECONDS = 15.0


def test_a_free_lease_is_taken_and_written_under_until_well_before_its_end() -> None:
    tenure = Tenure("me", SECONDS)
    assert not tenure.may_take(0.0), "nothing was read yet"
    tenure.see("", "", 0.0)
    assert tenure.may_take(0.0)
    assert not tenure.may_write(0.0)
    tenure.renew(1.0)
    assert tenure.may_write(10.9)
    assert not tenure.may_write(11.1)


def test_another_ones_lease_is_taken_only_when_it_has_stood_still_for_its_length() -> None:
    tenure = Tenure("me", SECONDS)
    tenure.see("other", "1", 0.0)
    tenure.see("other", "1", 14.0)
    assert not tenure.may_take(14.9)
    tenure.see("other", "2", 14.9)
    assert not tenure.may_take(29.8)
    tenure.see("other", "2", 29.9)
    assert tenure.may_take(29.9)


def test_a_lease_that_was_given_back_is_taken_at_once() -> None:
    tenure = Tenure("me", SECONDS)
    tenure.see("other", "1", 0.0)
    tenure.see("", "2", 1.0)
    assert tenure.may_take(1.0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0.0, 10.0), st.booleans()), max_size=60))
def test_no_two_replicas_ever_write_at_the_same_time(steps: list[tuple[str, float, bool]]) -> None:
    """Each replica has a clock of its own; the server takes a write only on the version that was read."""
    skew = {"a": 0.0, "b": 300.0}
    tenures = {name: Tenure(name, SECONDS) for name in skew}
    holder, version, read = "", 0, {"a": -1, "b": -1}
    now = 1000.0
    for name, pause, fails in steps:
        now += pause
        tenure, mine = tenures[name], now + skew[name]
        if fails:
            continue
        if not tenure.may_write(mine):
            tenure.see(holder, str(version), mine)
            read[name] = version
            if not tenure.may_take(mine):
                continue
        if read[name] == version:
            version += 1
            holder, read[name] = name, version
            tenure.renew(mine)
        else:
            tenure.lose()
        assert not (tenures["a"].may_write(now) and tenures["b"].may_write(now + skew["b"]))
