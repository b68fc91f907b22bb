"""Collections are made by the clock, in small pieces; of everything when there is something to gain."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from finetune_operator.server.collector import FULL_SECONDS, GROWTH_BYTES, Collector, resident_bytes

MIB = 1 << 20


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.me = self


def old_cycle() -> weakref.ref[Cycle]:
    """One that young collections do not look at any more."""
    cycle = Cycle()
    gc.collect(1)
    return weakref.ref(cycle)


@pytest.mark.parametrize(
    ("grown", "seconds", "collected"), [(0, 0.0, False), (GROWTH_BYTES, 0.0, True), (0, FULL_SECONDS, True)]
)
def test_all_is_collected_when_memory_has_grown_or_the_time_has_come(
    grown: int, seconds: float, collected: bool
) -> None:
    sizes = [100 * MIB]

    async def look() -> bool:
        loop = asyncio.get_running_loop()
        with Collector(loop, lambda: sizes[-1]) as collector:
            cycle = old_cycle()
            sizes.append(sizes[-1] + grown)
            later = loop.time() + seconds
            loop.time = lambda: later  # type: ignore[method-assign]
            collector.look_at_memory()
            return cycle() is None

    assert asyncio.run(look()) is collected


def test_young_objects_do_not_pile_up_where_each_replaces_one_that_is_freed() -> None:
    """Python's own count of allocations stays low then, and its look at them comes late and takes long."""

    async def replace() -> int:
        kept = [[number] for number in range(50_000)]
        with Collector(asyncio.get_running_loop(), lambda: MIB) as collector:
            for number in range(len(kept)):
                kept[number] = [number]
            piled_up = len(gc.get_objects(generation=0))
            collector.look_at_young()
            return piled_up - len(gc.get_objects(generation=0))

    assert asyncio.run(replace()) > 40_000


def test_python_makes_none_by_itself_meanwhile_and_does_so_again_after() -> None:
    before = gc.get_threshold()

    async def allocate() -> bool:
        with Collector(asyncio.get_running_loop(), lambda: MIB):
            cycle = old_cycle()
            kept = [[number] for number in range(200_000)]
            return cycle() is not None and len(kept) == 200_000

    assert asyncio.run(allocate())
    assert gc.get_threshold() == before


def test_the_memory_of_this_process_is_known() -> None:
    before = resident_bytes()
    ballast = bytearray(b"x" * (64 * MIB))
    assert resident_bytes() - before > 32 * MIB
    assert ballast
