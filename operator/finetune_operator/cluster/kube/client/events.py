"""Events for `kubectl describe`: sent aside, one after the other, so that no pass waits for them.

An event's name follows from what it says, so that a restarted operator, or a second one, does not say it again.
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
from finetune_operator.cluster.kube.client.client import ApiError, Json, KubeApi, NotLeaderError
from finetune_operator.cluster.kube.client.objects import EVENTS
from finetune_operator.cluster.protocol import Clock
from finetune_operator.plan.model.types import Event

log = logging.getLogger(__name__)

MAX_WAITING = 10_000
"""Events that may wait to be sent; further ones are dropped."""
MAX_REMEMBERED = 20_000
"""Names of events that are known to be there."""
MAX_LOOKS = 50
LOOK_SECONDS = 0.1
"""How often, and how far apart, an event looks whether more important writes wait, before it goes all the same."""
MAX_NOTE = 1024
"""Longest note that the API takes."""


class EventSender:
    """Takes events and sends them."""

    def __init__(self, api: KubeApi, clock: Clock, instance: str, busy: Callable[[], bool]) -> None:
        """Take what it works with.

        busy: whether more important writes wait; events wait for them, but not for ever.
        """
        self._api = api
        self._clock = clock
        self._instance = instance
        self._busy = busy
        self._waiting: asyncio.Queue[Json] = asyncio.Queue(MAX_WAITING)
        self._sent: OrderedDict[str, None] = OrderedDict()

    def tell(self, job: FineTuneJob, event: Event) -> None:
        """Take an event. One that was sent already is no news."""
        body = build_event(job, event, self._clock(), self._instance)
        name = body["metadata"]["name"]
        if name in self._sent:
            return
        self._sent[name] = None
        if len(self._sent) > MAX_REMEMBERED:
            self._sent.popitem(last=False)
        try:
            self._waiting.put_nowait(body)
        except asyncio.QueueFull:
            log.warning("too many events wait to be sent; dropped: %s %s", event.reason, event.message)

    async def run(self) -> None:
        """Send for ever."""
        while True:
            body = await self._waiting.get()
            await self._let_others_go_first()
            try:
                await self._api.create(EVENTS.path(body["metadata"]["namespace"]), body)
            except NotLeaderError:
                continue
            except ApiError as error:
                if not error.already_exists:
                    log.warning(
                        "cannot tell the event %s of %s: %s", body["reason"], body["involvedObject"]["name"], error
                    )

    async def _let_others_go_first(self) -> None:
        for _ in range(MAX_LOOKS):
            if not self._busy():
                return
            await asyncio.sleep(LOOK_SECONDS)


def build_event(job: FineTuneJob, event: Event, now: datetime, instance: str) -> Json:
    """An event of a job."""
    meta = job.metadata
    said = "\0".join((meta.uid, str(job.status.attempt), event.reason, event.message))
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
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
        "message": event.message if len(event.message) <= MAX_NOTE else event.message[: MAX_NOTE - 1] + "…",
        # What `kubectl describe` sorts and counts by; the newer API leaves them out.
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
        "source": {"component": OPERATOR},
        "reportingComponent": f"{OPERATOR}.io/{OPERATOR}",
        "reportingInstance": instance,
    }
