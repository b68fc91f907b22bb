"""A few tasks that make the passes: one job each at a time, again after an error, again when the plan asks for it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

from finetune_operator.cluster.kube.client.client import ApiError, NotLeaderError
from finetune_operator.cluster.kube.work.queue import Backoff, WorkQueue
from finetune_operator.cluster.protocol import Clock, Cluster, JobKey
from finetune_operator.cluster.reconcile import Pass, reconcile
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 60.0


class PassWatcher(Protocol):
    """Told of passes: metrics."""

    def passed(self, key: JobKey, seen: Pass, seconds: float) -> None:
        """A pass succeeded."""

    def failed(self, key: JobKey, error: Exception, seconds: float) -> None:
        """A pass broke off, and comes again."""


@dataclass
class Passes:
    """What the workers share."""

    cluster: Cluster
    queue: WorkQueue[JobKey]
    settings: Settings
    clock: Clock
    watcher: PassWatcher


class Workers:
    """The tasks and their signs of life."""

    def __init__(self, passes: Passes, num_workers: int) -> None:
        self._passes = passes
        self._num_workers = num_workers
        self._backoff: Backoff[JobKey] = Backoff(FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS)
        self._began_at: dict[JobKey, float] = {}
        self._turn = asyncio.Lock()

    def longest_pass_seconds(self, now: float) -> float:
        """Age of the oldest pass that is under way, by the loop's clock."""
        return max((now - began_at for began_at in self._began_at.values()), default=0.0)

    async def run(self) -> None:
        """Make passes until the queue is closed; those under way are finished."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._num_workers):
                group.create_task(self._work(), name=f"worker {number}")

    async def _work(self) -> None:
        queue = self._passes.queue
        while (key := await self._next()) is not None:
            try:
                await self._pass(key)
            finally:
                queue.done(key)

    async def _next(self) -> JobKey | None:
        """The next job, in a turn of the loop of its own.

        A pass thinks for some milliseconds, and one that finds nothing to write waits for nobody. A hundred of them, in
        a row or side by side, would keep the supervisors' beats waiting.
        """
        async with self._turn:
            await asyncio.sleep(0)
            return await self._passes.queue.get()

    async def _pass(self, key: JobKey) -> None:
        passes, loop = self._passes, asyncio.get_running_loop()
        began_at = self._began_at[key] = loop.time()
        try:
            seen = await reconcile(passes.cluster, key, passes.settings, passes.clock)
        except NotLeaderError:
            # This time of leading is over; whoever leads next makes this pass.
            return
        except Exception as error:  # one job's trouble must not become another one's
            self._come_again(key, error)
            passes.watcher.failed(key, error, loop.time() - began_at)
        else:
            self._backoff.forget(key)
            if seen.look_again is not None:
                passes.queue.add_after(key, seen.look_again.total_seconds())
            passes.watcher.passed(key, seen, loop.time() - began_at)
        finally:
            del self._began_at[key]

    def _come_again(self, key: JobKey, error: Exception) -> None:
        wait = self._backoff.next_seconds(key)
        about = {"job": str(key)}
        if isinstance(error, ApiError):
            wait = max(wait, error.retry_after_seconds or 0.0)
            log.warning("%s: the pass broke off, again in %.1f s: %s", key, wait, error, extra=about)
        else:
            log.exception("%s: the pass broke off, again in %.1f s", key, wait, extra=about, exc_info=error)
        self._passes.queue.add_after(key, wait)
