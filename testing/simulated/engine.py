"""Virtual time: a queue of timed actions, and coroutines that wait in it.

The real `reconcile` is a coroutine. Here it runs without an event loop: when it awaits a `Pause`, it continues after
that many virtual seconds, or never, if its operator was stopped in between.
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
    """The clock, the queue and the only random generator."""

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(seed)
        self.time = 0.0
        """Virtual seconds since the start."""
        self.num_events = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._num_queued = 0

    def now(self, skew_seconds: float = 0.0) -> datetime:
        """Return the time by a clock that is off by some seconds."""
        return EPOCH + timedelta(seconds=self.time + skew_seconds)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Queue an action for later; actions of the same time run in the order in which they were queued."""
        self._num_queued += 1
        heapq.heappush(self._queue, (self.time + seconds, self._num_queued, action))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Run actions until a time is reached, or until `stop` returns True; return whether `stop` came first."""
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
        """Draw whether an event of this probability happens."""
        return self.rng.random() < probability


class Pause:
    """Awaited by a coroutine that takes virtual time."""

    __slots__ = ("_seconds",)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __await__(self) -> Generator[float, None, None]:
        """Yield the length of the pause to the task that drives the coroutine."""
        yield self._seconds


class SimulatedTask(Generic[T]):
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
        """Run until the next pause or the end. Unexpected exceptions propagate to the caller of the engine."""
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
        """Stop for good: the process of the coroutine has been killed."""
        self._cancelled = True
        self._coroutine.close()
