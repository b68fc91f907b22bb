"""Young objects are collected at a fixed interval, everything only if memory has grown or after a long time."""

from __future__ import annotations

import asyncio
import gc
import mmap
import weakref

import pytest

from finetune_operator.server.garbage_collection import FULL_SECONDS, GROWTH_BYTES, GarbageCollector, resident_bytes

MIB = 1 << 20


class Cycle:
    """Garbage that only the cyclic collector finds."""

    def __init__(self) -> None:
        self.me = self


def old_cycle() -> weakref.ref[Cycle]:
    """Return a reference to a cycle that collections of young objects no longer inspect."""
    cycle = Cycle()
    gc.collect(1)
    return weakref.ref(cycle)


@pytest.mark.parametrize(
    ("grown", "seconds", "collected"), [(0, 0.0, False), (GROWTH_BYTES, 0.0, True), (0, FULL_SECONDS, True)]
)
def test_full_collection_runs_if_memory_has_grown_or_the_interval_is_over(
    grown: int, seconds: float, collected: bool
) -> None:
    sizes = [100 * MIB]

    async def check() -> bool:
        loop = asyncio.get_running_loop()
        with GarbageCollector(loop, lambda: sizes[-1]) as collector:
            cycle = old_cycle()
            sizes.append(sizes[-1] + grown)
            later = loop.time() + seconds
            loop.time = lambda: later  # type: ignore[method-assign]
            collector.collect_if_grown()
            return cycle() is None

    assert asyncio.run(check()) is collected


def test_young_objects_are_collected_even_if_each_replaces_a_freed_one() -> None:
    """Python's own allocation count stays low in this case, so its collection is late and takes long."""

    async def replace() -> int:
        kept = [[number] for number in range(50_000)]
        with GarbageCollector(asyncio.get_running_loop(), lambda: MIB) as collector:
            for number in range(len(kept)):
                kept[number] = [number]
            accumulated = len(gc.get_objects(generation=0))
            collector.collect_young()
            return accumulated - len(gc.get_objects(generation=0))

    assert asyncio.run(replace()) > 40_000


def test_python_runs_no_full_collection_by_itself_until_the_end() -> None:
    before = gc.get_threshold()

    async def allocate() -> bool:
        with GarbageCollector(asyncio.get_running_loop(), lambda: MIB):
            cycle = old_cycle()
            kept = [[number] for number in range(200_000)]
            return cycle() is not None and len(kept) == 200_000

    assert asyncio.run(allocate())
    assert gc.get_threshold() == before


def test_resident_memory_is_reported() -> None:
    before = resident_bytes()
    with mmap.mmap(-1, 64 * MIB) as ballast:  # always new pages: an allocator would reuse what earlier tests have freed
        ballast.write(b"x" * (64 * MIB))
        assert resident_bytes() - before > 32 * MIB
