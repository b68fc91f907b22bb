from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.cluster.kube.work.queue import CALM_SHARE, Backoff, Lanes, WorkQueue

DEADLINE_SECONDS = 10.0


def run(test: Callable[[WorkQueue[str]], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await test(WorkQueue())

    asyncio.run(main())


def test_a_key_waits_once_and_in_order() -> None:
    async def test(queue: WorkQueue[str]) -> None:
        for key in ("a", "b", "a"):
            queue.add(key)
        assert queue.depth == 2
        assert [await queue.get(), await queue.get()] == ["a", "b"]
        assert queue.depth == 0

    run(test)


def test_a_key_that_is_asked_for_during_its_pass_comes_again_after_it() -> None:
    async def test(queue: WorkQueue[str]) -> None:
        queue.add("a")
        key = await queue.get()
        assert key is not None
        queue.add("a")
        queue.add("b")
        # Not handed to a second worker while the first one has it.
        assert await queue.get() == "b"
        queue.done(key)
        assert await queue.get() == "a"

    run(test)


def test_a_later_wish_does_not_put_off_an_earlier_one() -> None:
    async def test(queue: WorkQueue[str]) -> None:
        queue.add_after("a", 0.01)
        queue.add_after("a", 3600)
        assert await queue.get() == "a"

    run(test)


def test_an_earlier_wish_replaces_a_later_one_and_a_pass_takes_the_place_of_both() -> None:
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


def test_closing_wakes_all_workers_and_takes_nothing_more() -> None:
    async def test(queue: WorkQueue[str]) -> None:
        workers = [asyncio.create_task(queue.get()) for _ in range(3)]
        queue.add_after("a", 3600)
        queue.close()
        assert await asyncio.gather(*workers) == [None, None, None]
        queue.add("b")
        assert await queue.get() is None

    run(test)


def test_urgent_keys_come_first_and_calm_ones_have_their_turn() -> None:
    lanes: Lanes[str] = Lanes()
    assert lanes.put("calm", urgent=False)
    for number in range(2 * CALM_SHARE):
        assert lanes.put(f"urgent-{number}", urgent=True)
    order = [lanes.pop() for _ in range(len(lanes))]
    assert order.index("calm") == CALM_SHARE - 1
    order.remove("calm")
    assert order == [f"urgent-{number}" for number in range(2 * CALM_SHARE)]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=60), st.data())
def test_each_key_is_handed_out_once_for_all_that_was_asked(asked: list[tuple[str, bool]], data: st.DataObject) -> None:
    lanes: Lanes[str] = Lanes()
    waiting: set[str] = set()
    for key, urgent in asked:
        assert lanes.put(key, urgent=urgent) == (key not in waiting)
        waiting.add(key)
        if data.draw(st.booleans()):
            waiting.remove(lanes.pop())
        assert len(lanes) == len(waiting)
    assert sorted(lanes.pop() for _ in range(len(lanes))) == sorted(waiting)


def test_backoff_doubles_up_to_its_bound_and_starts_anew_after_a_success() -> None:
    backoff: Backoff[str] = Backoff(1.0, 5.0)
    assert [backoff.next_seconds("a") for _ in range(4)] == [1.0, 2.0, 4.0, 5.0]
    assert backoff.next_seconds("b") == 1.0
    backoff.forget("a")
    assert backoff.next_seconds("a") == 1.0
    for _ in range(5000):
        assert backoff.next_seconds("a") <= 5.0
