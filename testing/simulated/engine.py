"""Virtual time: a queue of what happens when, and coroutines that wait in it.

The real `reconcile` is a coroutine. Here it is driven without an event loop: whenever it awaits a `Pause`, it goes on
so many virtual seconds later, or never, where its operator has died meanwhile.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Coroutine, Generator
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
T = TypeVar("T")


class Engine:
    """The clock, the queue and the one source of chance."""

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(seed)
        self.time = 0.0
        """Virtual seconds since the start."""
        self.num_events = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._num_queued = 0

    def now(self, skew_seconds: float = 0.0) -> datetime:
        """The time, by a clock that is off by some seconds."""
        return EPOCH + timedelta(seconds=self.time + skew_seconds)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Let something happen so many seconds from now; things of one moment happen in the order of asking."""
        self._num_queued += 1
        heapq.heappush(self._queue, (self.time + seconds, self._num_queued, action))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Let things happen until a time, or until `stop`; say whether that came first."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            self.time, _, action = heapq.heappop(queue)
            self.num_events += 1
            action()
            if stop():
                return True
        self.time = max(self.time, until)
        return False

    def chance(self, probability: float) -> bool:
        """Whether something happens that happens so often."""
        return self.rng.random() < probability


class Pause:
    """Awaited by a coroutine that takes virtual time."""

    __slots__ = ("_seconds",)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __await__(self) -> Generator[float, None, None]:
        """Hand the length of the pause to the task that drives the coroutine."""
        yield self._seconds


class Task(Generic[T]):
    """Drives one coroutine through virtual time."""

    def __init__(
        self,
        engine: Engine,
        coroutine: Coroutine[Any, Any, T],
        on_end: Callable[[T | None, Exception | None], None],
        expected: type[Exception],
    ) -> None:
        self._engine = engine
        self._coroutine = coroutine
        self._on_end = on_end
        self._expected = expected
        self._cancelled = False

    def step(self) -> None:
        """Go on until the next pause or the end. What is not expected goes up to the caller of the engine."""
        if self._cancelled:
            return
        try:
            seconds = self._coroutine.send(None)
        except StopIteration as stop:
            self._on_end(stop.value, None)
        except self._expected as error:
            self._on_end(None, error)
        else:
            self._engine.after(seconds, self.step)

    def cancel(self) -> None:
        """Never go on: its process has died."""
        self._cancelled = True
        self._coroutine.close()
