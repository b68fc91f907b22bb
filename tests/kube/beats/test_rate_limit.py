from __future__ import annotations

from finetune_operator.cluster.kube.beats.rate_limit import RateLimit


def test_sender_above_the_rate_is_refused_until_it_pauses() -> None:
    limit = RateLimit(2.0, 3.0)
    assert [limit.allow("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert limit.allow("b", 0.0)
    assert limit.allow("a", 0.6)
    assert not limit.allow("a", 0.6)


def test_idle_senders_are_dropped() -> None:
    limit = RateLimit(1.0, 1.0, max_senders=2)
    for number in range(100):
        limit.allow(str(number), float(10 * number))
    assert len(limit._buckets) <= 2
