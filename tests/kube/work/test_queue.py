from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.cluster.kube.work.queue import (
    LOW_PRIORITY_SECONDS,
    LOW_PRIORITY_SHARE,
    Backoff,
    PriorityLanes,
    WorkQueue,
)

DEADLINE_SECONDS = 10.0


def run(test: Callable[[WorkQueue[str]], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await test(WorkQueue())

    asyncio.run(main())


def test_keys_are_queued_once_and_in_order() -> None:
    async def test(queue: WorkQueue[str]) -> None:
        for key in ("a", "b", "a"):
            queue.add(key)
        assert queue.depth == 2
        assert [await queue.get(), await queue.get()] == ["a", "b"]
        assert queue.depth == 0

    run(test)


def test_key_that_is_added_during_its_reconcile_is_returned_again_afterwards() -> None:
    async def test(queue: WorkQueue[str]) -> None:
        queue.add("a")
        key = await queue.get()
        assert key is not None
        queue.add("a")
        queue.add("b")
        # Not given to a second worker while the first one reconciles it.
        assert await queue.get() == "b"
        queue.done(key)
        assert await queue.get() == "a"

    run(test)


def test_an_urgent_request_of_a_reconcile_is_served_first_but_only_every_second_time() -> None:
    """The jobs of a burst begin one after the other, and none holds the others up."""

    async def test(queue: WorkQueue[str]) -> None:
        for key in ("a", "b", "c"):
            queue.add(key)
        order: list[str] = []
        for _ in range(7):
            returned = await queue.get()
            assert returned is not None
            order.append(returned)
            if returned == "a":
                queue.add(returned)
            elif order.count(returned) == 1:
                # Progress never goes before the other keys.
                queue.add(returned, urgent=returned == "b")
            queue.done(returned)
        assert order == ["a", "a", "b", "b", "c", "a", "a"]

    run(test)


def test_later_delay_does_not_replace_an_earlier_one() -> None:
    async def test(queue: WorkQueue[str]) -> None:
        queue.add_after("a", 0.01)
        queue.add_after("a", 3600)
        assert await queue.get() == "a"

    run(test)


def test_earlier_delay_replaces_a_later_one_and_a_reconcile_cancels_both() -> None:
    async def test(queue: WorkQueue[str]) -> None:
        queue.add_after("a", 3600)
        queue.add_after("a", 0.01)
        assert await queue.get() == "a"
        queue.done("a")
        queue.add("a")
        queue.add_after("b", 0.01)
        assert await queue.get() == "a"
        queue.done("a")
        assert await queue.get() == "b"
        assert queue.depth == 0

    run(test)


def test_back_off_delays_all_requests_but_urgent_ones() -> None:
    """A heartbeat that arrives before, during or after a failed reconcile does not start the next one."""

    async def test(queue: WorkQueue[str]) -> None:
        queue.add("a")
        assert await queue.get() == "a"
        queue.add_after("a", 0)
        queue.hold("a", 3600)
        queue.done("a")
        queue.add_after("a", 0)
        queue.add_after("b", 0.01)
        assert await queue.get() == "b"
        assert queue.depth == 0
        queue.add("a")
        assert await queue.get() == "a"
        queue.done("a")
        # The back-off is over: another reconcile has begun.
        queue.add_after("a", 0)
        assert await queue.get() == "a"

    run(test)


def test_low_priority_request_during_a_reconcile_that_fails_waits_for_its_back_off() -> None:
    async def test(queue: WorkQueue[str]) -> None:
        queue.add("a")
        assert await queue.get() == "a"
        queue.add("a", urgent=False)
        queue.hold("a", 3600)
        queue.done("a")
        queue.add_after("b", 0.01)
        assert await queue.get() == "b"
        assert queue.depth == 0

    run(test)


def test_closing_wakes_all_workers_and_accepts_no_more_keys() -> None:
    async def test(queue: WorkQueue[str]) -> None:
        workers = [asyncio.create_task(queue.get()) for _ in range(3)]
        queue.add_after("a", 3600)
        queue.close()
        assert await asyncio.gather(*workers) == [None, None, None]
        queue.add("b")
        assert await queue.get() is None

    run(test)


def test_urgent_keys_come_first_and_one_in_n_is_a_low_priority_key_that_has_waited() -> None:
    lanes: PriorityLanes[str] = PriorityLanes()
    assert lanes.put("low", 0.0, urgent=False)
    for number in range(2 * LOW_PRIORITY_SHARE):
        assert lanes.put(f"urgent-{number}", 0.0, urgent=True)
    assert lanes.num_urgent == 2 * LOW_PRIORITY_SHARE
    order = [lanes.pop(LOW_PRIORITY_SECONDS)[0] for _ in range(len(lanes))]
    assert order.index("low") == LOW_PRIORITY_SHARE - 1
    order.remove("low")
    assert order == [f"urgent-{number}" for number in range(2 * LOW_PRIORITY_SHARE)]
    assert lanes.num_urgent == 0


def test_a_burst_of_urgent_keys_is_served_before_progress() -> None:
    lanes: PriorityLanes[str] = PriorityLanes()
    lanes.put("moved", 0.0, urgent=False)
    lanes.put("low", LOW_PRIORITY_SECONDS, urgent=False)
    lanes.put("moved", LOW_PRIORITY_SECONDS, urgent=True)
    for number in range(5 * LOW_PRIORITY_SHARE):
        lanes.put(f"urgent-{number}", LOW_PRIORITY_SECONDS, urgent=True)
    # The key that became urgent has no part in the wait of the other one.
    order = [lanes.pop(2 * LOW_PRIORITY_SECONDS - 0.1)[0] for _ in range(len(lanes))]
    assert order[0] == "moved"
    assert order[-1] == "low"


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=60), st.data())
def test_each_key_is_returned_once_for_all_its_requests(requests: list[tuple[str, bool]], data: st.DataObject) -> None:
    lanes: PriorityLanes[str] = PriorityLanes()
    waiting: set[str] = set()
    for number, (key, urgent) in enumerate(requests):
        assert lanes.put(key, float(number), urgent=urgent) == (key not in waiting)
        waiting.add(key)
        if data.draw(st.booleans()):
            waiting.remove(lanes.pop(float(number))[0])
        assert len(lanes) == len(waiting) >= lanes.num_urgent
    assert sorted(lanes.pop(100.0)[0] for _ in range(len(lanes))) == sorted(waiting)
    assert lanes.num_urgent == 0


def test_urgent_keys_count_until_their_reconcile_has_ended() -> None:
    """A burst may wait for the API server, not in the queue."""

    async def test(queue: WorkQueue[str]) -> None:
        queue.add("a")
        queue.add("b")
        queue.add("progress", urgent=False)
        counts = [queue.num_urgent]
        for _ in range(3):
            await queue.get()
            counts.append(queue.num_urgent)
        for key in ("progress", "a", "a", "b"):
            queue.done(key)
            counts.append(queue.num_urgent)
        assert counts == [2, 2, 2, 2, 2, 1, 1, 0]

    run(test)


def test_backoff_doubles_up_to_its_limit_and_restarts_after_a_success() -> None:
    backoff: Backoff[str] = Backoff(1.0, 5.0)
    assert [backoff.next_seconds("a") for _ in range(4)] == [1.0, 2.0, 4.0, 5.0]
    assert backoff.next_seconds("b") == 1.0
    backoff.forget("a")
    assert backoff.next_seconds("a") == 1.0
    for _ in range(5000):
        assert backoff.next_seconds("a") <= 5.0
