"""Sends the supervisor's heartbeats: at once after a change, otherwise every few seconds.

A coordinator that does not answer changes nothing for the ranks: training continues. While the pod has no ranks, the
coordinator may keep its reply until there is something to do, so that the ranks start again at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from finetune_contract.heartbeat import MAX_BEAT_BYTES, MAX_TEXT, WAIT_SECONDS, Heartbeat, Reply
from finetune_trainer.supervisor.client import CoordinatorClient, CoordinatorError, InterruptedPostError
from finetune_trainer.supervisor.config import Config
from finetune_trainer.supervisor.log import log

RETRY_SECONDS = 1.0
"""Minimum time until the next heartbeat after one without a reply."""
MIN_GAP_SECONDS = 0.05
"""Minimum time between two heartbeats: changes that are closer together share one."""


class HeartbeatSender:
    """Sends heartbeats until the supervisor ends.

    Args:
        config: address of the coordinator and default interval.
        build: builds the heartbeat with the given sequence number.
        obey: acts on a reply.
        is_final: whether the next heartbeat is the last one.
    """

    def __init__(
        self,
        config: Config,
        build: Callable[[int], Heartbeat],
        obey: Callable[[Reply], None],
        is_final: Callable[[], bool],
    ) -> None:
        self._config = config
        self._seconds = config.beat_seconds
        self._build = build
        self._obey = obey
        self._is_final = is_final
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="heartbeat")
        self._sequence = 0
        self._is_unreachable = False
        self._tried = asyncio.Event()
        self.due = asyncio.Event()
        """Set this to send the next heartbeat at once."""
        self.last_reply_at = -math.inf
        """Time of the last reply, by the event loop's clock."""

    async def run(self) -> None:
        """Send heartbeats until the last one has been sent."""
        config = self._config
        if not config.coordinator_url:
            return
        client = CoordinatorClient(config.coordinator_url, config.coordinator_token, config.coordinator_ca)
        is_last = False
        while not is_last:
            self.due.clear()
            is_last = self._is_final()
            await self._send(client)
            self._tried.set()
            if not is_last:
                await asyncio.sleep(MIN_GAP_SECONDS)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.due.wait(), self._seconds)

    async def wait_until_tried(self) -> None:
        """Wait until the first heartbeat was answered or has failed. Return at once if there is no coordinator."""
        if self._config.coordinator_url:
            await self._tried.wait()

    async def _send(self, client: CoordinatorClient) -> None:
        loop = asyncio.get_running_loop()
        self._sequence += 1
        beat = fit(self._build(self._sequence))
        wait_seconds = 0.0
        if beat.joining:
            wait_seconds = WAIT_SECONDS
        elif beat.waiting:
            # A pod that has heard nothing for `hold_seconds` ends.
            wait_seconds = min(WAIT_SECONDS, self._config.hold_seconds // 2)
        post = loop.run_in_executor(self._thread, client.post, beat, wait_seconds)
        try:
            reply = await (self._interruptible(client, post) if wait_seconds else post)
        except InterruptedPostError:
            return
        except CoordinatorError as error:
            if not self._is_unreachable:
                effect = "the address of rank 0 is not known yet" if beat.joining else "training continues"
                log(f"cannot reach the coordinator ({error}); {effect}")
            self._is_unreachable = True
            # The last reply may have requested the next heartbeat at once.
            retry = min(RETRY_SECONDS, self._config.beat_seconds)
            self._seconds = retry if beat.joining else max(self._seconds, retry)
            return
        if self._is_unreachable:
            log("the coordinator answers again")
        self._is_unreachable = False
        self.last_reply_at = loop.time()
        self._seconds = reply.beat_seconds or self._config.beat_seconds
        self._obey(reply)

    async def _interruptible(self, client: CoordinatorClient, post: asyncio.Future[Reply]) -> Reply:
        """Return the reply, unless another heartbeat becomes due before it arrives."""
        due = asyncio.ensure_future(self.due.wait())
        either: set[asyncio.Future[Any]] = {post, due}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            due.cancel()
        while not post.done():
            client.interrupt()
            await asyncio.wait({post}, timeout=MIN_GAP_SECONDS)
        return post.result()


def fit(beat: Heartbeat) -> Heartbeat:
    """Shorten the texts of a heartbeat until the coordinator accepts its size. Numbers and states are kept."""
    keep = MAX_TEXT
    while len(beat.to_json().encode()) > MAX_BEAT_BYTES and keep > 0:
        keep //= 2
        beat = _shorten(beat, keep)
    return beat


def _shorten(beat: Heartbeat, keep: int) -> Heartbeat:
    """Keep this number of characters of each text; 0: no text."""
    ranks = tuple(
        report.model_copy(
            update={
                "detail": report.detail[:keep] if report.detail else None,
                # An empty error means that it is over.
                "checkpoint_error": report.checkpoint_error and report.checkpoint_error[: max(1, keep)],
                "warnings": tuple(text[:keep] for text in report.warnings) if keep else (),
            }
        )
        for report in beat.ranks
    )
    ends = tuple(end.model_copy(update={"last_words": end.last_words[-keep:] if keep else ""}) for end in beat.ends)
    return beat.model_copy(update={"ranks": ranks, "ends": ends})
