"""What a long collection found alive is not looked at again and again."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest

from finetune_operator.operator_main.collector import LONG_SECONDS, OLDEST, Collector


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_frozen")
@pytest.mark.parametrize(
    ("generation", "seconds", "frozen"),
    [(OLDEST, 2 * LONG_SECONDS, True), (OLDEST, LONG_SECONDS / 2, False), (0, 2 * LONG_SECONDS, False)],
)
def test_what_a_long_collection_leaves_is_set_aside(generation: int, seconds: float, frozen: bool) -> None:
    moments = iter((0.0, seconds))

    async def collect() -> int:
        collector = Collector(asyncio.get_running_loop(), clock=lambda: next(moments))
        gc.unfreeze()
        collector.see("start", {"generation": generation})
        collector.see("stop", {"generation": generation})
        await asyncio.sleep(0)
        return gc.get_freeze_count()

    assert (asyncio.run(collect()) > 0) is frozen


@pytest.mark.usefixtures("nothing_frozen")
def test_it_watches_while_it_is_entered() -> None:
    async def enter() -> tuple[bool, bool]:
        collector = Collector(asyncio.get_running_loop())
        with collector:
            inside = collector.see in gc.callbacks
        return inside, collector.see in gc.callbacks

    assert asyncio.run(enter()) == (True, False)
