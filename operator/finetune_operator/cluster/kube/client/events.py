"""Events for `kubectl describe`, sent one after the other in a separate task, so that no reconcile waits for them.

An event's name is derived from its content, so that a restarted operator or a second replica does not repeat it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime

from finetune_operator.api.job import API_VERSION, KIND, FineTuneJob
from finetune_operator.api.names import OPERATOR
from finetune_operator.cluster.kube.client.client import LEADER_SECONDS, ApiError, Json, KubeApi, NotLeaderError
from finetune_operator.cluster.kube.client.objects import EVENTS
from finetune_operator.cluster.protocol import Clock
from finetune_operator.plan.model.types import Event

log = logging.getLogger(__name__)

MAX_QUEUED = 10_000
"""Events that may wait to be sent; further ones are dropped."""
MAX_REMEMBERED = 20_000
"""Names of sent events that are remembered."""
MAX_BUSY_CHECKS = 50
BUSY_CHECK_SECONDS = 0.1
"""Number and interval of the checks for more important writes before an event is sent anyway."""
MAX_MESSAGE = 1024
"""Longest message that the API accepts."""


class EventSender:
    """Queue of events, and the task that sends them."""

    def __init__(self, api: KubeApi, clock: Clock, instance: str, busy: Callable[[], bool]) -> None:
        """Create an empty queue.

        Args:
            api: where events are sent.
            clock: time of the events.
            instance: identity of this replica.
            busy: returns whether more important writes wait; events are delayed for them, for a limited time.
        """
        self._api = api
        self._clock = clock
        self._instance = instance
        self._busy = busy
        self._queue: asyncio.Queue[Json] = asyncio.Queue(MAX_QUEUED)
        self._sent: OrderedDict[str, None] = OrderedDict()

    def enqueue(self, job: FineTuneJob, event: Event) -> None:
        """Queue an event, unless it was sent before."""
        body = build_event(job, event, self._clock(), self._instance)
        name = body["metadata"]["name"]
        if name in self._sent:
            return
        self._sent[name] = None
        if len(self._sent) > MAX_REMEMBERED:
            self._sent.popitem(last=False)
        try:
            self._queue.put_nowait(body)
        except asyncio.QueueFull:
            log.warning("the event queue is full; dropped: %s %s", event.reason, event.message)

    async def run(self) -> None:
        """Send events until cancelled."""
        while True:
            body = await self._queue.get()
            await self._wait_while_busy()
            while True:
                if await self._is_sent(body):
                    break
                await asyncio.sleep(LEADER_SECONDS)

    async def _is_sent(self, body: Json) -> bool:
        """Send an event; return whether nothing remains to be done."""
        try:
            await self._api.create(EVENTS.path(body["metadata"]["namespace"]), body)
        except NotLeaderError:
            return False
        except ApiError as error:
            if not error.already_exists:
                log.warning("cannot send the event %s of %s: %s", body["reason"], body["involvedObject"]["name"], error)
        return True

    async def _wait_while_busy(self) -> None:
        for _ in range(MAX_BUSY_CHECKS):
            if not self._busy():
                return
            await asyncio.sleep(BUSY_CHECK_SECONDS)


def build_event(job: FineTuneJob, event: Event, now: datetime, instance: str) -> Json:
    """Return the manifest of an event of a job."""
    meta = job.metadata
    content = "\0".join((meta.uid, str(job.status.attempt), event.reason, event.message))
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{meta.name}.{digest}", "namespace": meta.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
        },
        "type": "Warning" if event.warning else "Normal",
        "reason": event.reason,
        "message": event.message if len(event.message) <= MAX_MESSAGE else event.message[: MAX_MESSAGE - 1] + "…",
        # `kubectl describe` sorts and counts by these fields; the newer events API does not set them.
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
        "source": {"component": OPERATOR},
        "reportingComponent": f"{OPERATOR}.io/{OPERATOR}",
        "reportingInstance": instance,
    }
