"""Tasks that reconcile jobs: retried after an error, and repeated when the plan requests it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

from finetune_operator.cluster.kube.client.client import LEADER_SECONDS, ApiError, NotLeaderError
from finetune_operator.cluster.kube.client.refusals import CreationError
from finetune_operator.cluster.kube.work.queue import Backoff, WorkQueue
from finetune_operator.cluster.protocol import Clock, Cluster, JobKey
from finetune_operator.cluster.reconcile import ReconcileResult, reconcile
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 60.0


class ReconcileObserver(Protocol):
    """Observer of reconciles: metrics."""

    def succeeded(self, key: JobKey, result: ReconcileResult, seconds: float) -> None:
        """Handle a reconcile that succeeded."""

    def failed(self, key: JobKey, error: Exception, seconds: float) -> None:
        """Handle a reconcile that failed and is retried."""


@dataclass
class WorkerContext:
    """Objects that the workers share."""

    cluster: Cluster
    queue: WorkQueue[JobKey]
    settings: Settings
    clock: Clock
    observer: ReconcileObserver


class Workers:
    """The worker tasks and the start times of their reconciles."""

    def __init__(self, context: WorkerContext, num_workers: int) -> None:
        self._context = context
        self._num_workers = num_workers
        self._backoff: Backoff[JobKey] = Backoff(FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS)
        self._began_at: dict[JobKey, float] = {}
        self._next_lock = asyncio.Lock()

    def longest_reconcile_seconds(self, now: float) -> float:
        """Return the duration of the longest running reconcile; `now` is of the event loop's clock."""
        return max((now - began_at for began_at in self._began_at.values()), default=0.0)

    async def run(self) -> None:
        """Reconcile jobs until the queue is closed; running reconciles are completed."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._num_workers):
                group.create_task(self._work(), name=f"worker {number}")

    async def _work(self) -> None:
        queue = self._context.queue
        while (key := await self._next()) is not None:
            try:
                await self._reconcile(key)
            finally:
                queue.done(key)

    async def _next(self) -> JobKey | None:
        """Return the next job, at most one per iteration of the event loop.

        A reconcile computes for some milliseconds, and does not await I/O if there is nothing to write. A hundred of
        them in one iteration would delay the replies to heartbeats.
        """
        async with self._next_lock:
            await asyncio.sleep(0)
            return await self._context.queue.get()

    async def _reconcile(self, key: JobKey) -> None:
        context, loop = self._context, asyncio.get_running_loop()
        began_at = self._began_at[key] = loop.time()
        try:
            result = await reconcile(context.cluster, key, context.settings, context.clock)
        except NotLeaderError:
            # If this term of leadership is over, the queue is closed, and the next leader reconciles the job.
            context.queue.add_after(key, LEADER_SECONDS)
        except Exception as error:  # an error of one job must not affect other jobs
            self._retry(key, error)
            context.observer.failed(key, error, loop.time() - began_at)
        else:
            self._backoff.forget(key)
            if result.requeue_after is not None:
                context.queue.add_after(key, result.requeue_after.total_seconds())
            context.observer.succeeded(key, result, loop.time() - began_at)
        finally:
            del self._began_at[key]

    def _retry(self, key: JobKey, error: Exception) -> None:
        wait = self._backoff.next_seconds(key)
        about = {"job": str(key)}
        if isinstance(error, CreationError):
            wait = error.retry_after_seconds or 0.0
            log.warning("%s: creation failed; the next one in %.1f s: %s", key, wait, error, extra=about)
        elif isinstance(error, ApiError):
            wait = max(wait, error.retry_after_seconds or 0.0)
            log.warning("%s: reconcile failed; retrying in %.1f s: %s", key, wait, error, extra=about)
        else:
            log.exception("%s: reconcile failed; retrying in %.1f s", key, wait, extra=about, exc_info=error)
        if isinstance(error, CreationError):
            self._context.queue.add_after(key, wait)
        else:
            self._context.queue.hold(key, wait)
