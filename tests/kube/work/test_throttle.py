from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.cluster.kube.beats.limits import RateLimit
from finetune_operator.cluster.kube.work.throttle import ProgressThrottle


def test_a_job_writes_its_progress_once_in_its_time() -> None:
    throttle: ProgressThrottle[str] = ProgressThrottle(5.0, 100.0, 100.0)
    assert throttle.delay("a", 10.0) == 0.0
    throttle.wrote("a", 10.0)
    assert throttle.delay("a", 11.0) == 4.0
    assert throttle.delay("a", 14.0) == 1.0, "the moment stays the same"
    assert throttle.delay("a", 15.0) == 0.0
    assert throttle.delay("b", 15.0) == 0.0, "another job is not held up"


def test_a_write_for_another_reason_counts_too() -> None:
    throttle: ProgressThrottle[str] = ProgressThrottle(5.0, 100.0, 100.0)
    throttle.wrote("a", 10.0)
    assert throttle.delay("a", 12.0) == 3.0
    throttle.wrote("a", 13.0)
    assert throttle.delay("a", 13.0) == 5.0


@given(
    st.lists(st.tuples(st.integers(0, 19), st.floats(0.0, 0.2)), min_size=1, max_size=200),
    st.floats(0.5, 20.0),
    st.integers(1, 10),
)
def test_all_jobs_together_keep_within_the_budget(news: list[tuple[int, float]], rate: float, burst: int) -> None:
    """In no stretch of time are there more writes than the burst and what the rate allows in it."""
    throttle: ProgressThrottle[int] = ProgressThrottle(1.0, rate, float(burst))
    now, writes, due = 100.0, list[float](), dict[int, float]()
    for key, pause in news:
        now += pause
        due.setdefault(key, now)
    while due:
        key = min(due, key=lambda waiting: due[waiting])
        now = due.pop(key)
        if (wait := throttle.delay(key, now)) > 1e-9:
            due[key] = now + wait
        else:
            throttle.wrote(key, now)
            writes.append(now)
            if len(writes) < 100:
                due[key] = now
    for first, start in enumerate(writes):
        for last in range(first, len(writes)):
            assert last - first + 1 <= burst + (writes[last] - start) * rate + 0.01


def test_a_pod_that_beats_too_often_is_refused_until_it_has_been_quiet() -> None:
    limit = RateLimit(2.0, 3.0)
    assert [limit.allow("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert limit.allow("b", 0.0)
    assert limit.allow("a", 0.6)
    assert not limit.allow("a", 0.6)


def test_senders_that_are_gone_are_forgotten() -> None:
    limit = RateLimit(1.0, 1.0, max_senders=2)
    for number in range(100):
        limit.allow(str(number), float(10 * number))
    assert len(limit._buckets) <= 2
