from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.cluster.kube.work.throttle import ProgressThrottle


def test_progress_of_a_job_is_written_once_per_interval() -> None:
    throttle: ProgressThrottle[str] = ProgressThrottle(5.0, 100.0, 100.0)
    assert throttle.delay("a", 10.0) == 0.0
    throttle.record_write("a", 10.0)
    assert throttle.delay("a", 11.0) == 4.0
    assert throttle.delay("a", 14.0) == 1.0, "the time of the next write stays the same"
    assert throttle.delay("a", 15.0) == 0.0
    assert throttle.delay("b", 15.0) == 0.0, "another job is not delayed"


def test_writes_for_other_reasons_restart_the_interval() -> None:
    throttle: ProgressThrottle[str] = ProgressThrottle(5.0, 100.0, 100.0)
    throttle.record_write("a", 10.0)
    assert throttle.delay("a", 12.0) == 3.0
    throttle.record_write("a", 13.0)
    assert throttle.delay("a", 13.0) == 5.0


def test_progress_waits_longer_while_jobs_wait_to_be_created_or_replaced() -> None:
    throttle: ProgressThrottle[str] = ProgressThrottle(5.0, 100.0, 100.0)
    assert throttle.delay("a", 10.0, busy=True) == 0.0, "the first progress of a job is not delayed"
    throttle.record_write("a", 10.0)
    assert throttle.delay("a", 15.0, busy=True) == 25.0
    assert throttle.delay("a", 15.0) == 0.0, "the shorter interval holds again as soon as nothing else waits"
    assert throttle.delay("a", 40.0, busy=True) == 0.0


@given(
    st.lists(st.tuples(st.integers(0, 19), st.floats(0.0, 0.2)), min_size=1, max_size=200),
    st.floats(0.5, 20.0),
    st.integers(1, 10),
)
def test_all_jobs_together_stay_within_the_rate(changes: list[tuple[int, float]], rate: float, burst: int) -> None:
    """In each period there are at most as many writes as the burst plus what the rate allows in it."""
    throttle: ProgressThrottle[int] = ProgressThrottle(1.0, rate, float(burst))
    now, writes, due = 100.0, list[float](), dict[int, float]()
    for key, pause in changes:
        now += pause
        due.setdefault(key, now)
    while due:
        key = min(due, key=lambda waiting: due[waiting])
        now = due.pop(key)
        if (wait := throttle.delay(key, now)) > 1e-9:
            due[key] = now + wait
        else:
            throttle.record_write(key, now)
            writes.append(now)
            if len(writes) < 100:
                due[key] = now
    assert len(writes) >= len({key for key, _ in changes})
    for first, start in enumerate(writes):
        for last in range(first, len(writes)):
            assert last - first + 1 <= burst + (writes[last] - start) * rate + 0.01
