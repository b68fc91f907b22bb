"""Keeps a cache in sync with the API server: lists once, then watches, and lists again if the watch has expired.

Kopf's watch is not sufficient for a cache: it reports neither when a list is complete nor which objects were deleted
while a watch was expired (docs/adr/0004-caches-of-our-own.md).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from finetune_operator.cluster.kube.client.client import GONE, JSON, ApiError, Json, KubeApi, iterate_pages
from finetune_operator.cluster.kube.client.objects import Resource
from finetune_operator.cluster.kube.watch.cache import Cache, Entry, ObjectKey

T = TypeVar("T")
log = logging.getLogger(__name__)

PAGE_OBJECTS = "250"
"""Objects per page of a list: the JSON of one page is in memory at once."""
WATCH_SECONDS = (240, 480)
"""Bounds of a watch's duration in seconds; the value is random, so that watches do not all end at the same time."""
RETRY_SECONDS = (0.5, 5.0)
"""First and longest delay after an error."""


@dataclass(frozen=True)
class WatchSource(Generic[T]):
    """A collection to list and watch, and how to decode its objects."""

    resource: Resource
    decode: Callable[[Json], T | None]
    """Converts an object from JSON to the cached value; None: do not cache it."""
    query: dict[str, str] = field(default_factory=dict)
    """Label and field selectors."""
    list_accept: str = JSON
    watch_accept: str = JSON


class Reflector(Generic[T]):
    """The task that keeps one cache in sync, for one namespace or, if its scope is empty, for all of them."""

    def __init__(self, api: KubeApi, source: WatchSource[T], cache: Cache[T], scope: str = "") -> None:
        self._api = api
        self._scope = scope
        self._path = source.resource.path(scope)
        self._must_list = True
        self._source = source
        self._cache = cache
        self.synced = asyncio.Event()
        """Set once the cache contains a complete list."""
        self.last_response_at = float("-inf")
        """Time of the server's last response, by the event loop's clock."""
        self.last_activity_at = float("-inf")
        """Time of the last response or error: shows that this task is alive."""

    async def run(self) -> None:
        """List and watch until cancelled."""
        wait = RETRY_SECONDS[0]
        while True:
            try:
                if self._must_list:
                    await self._list()
                await self._watch()
                wait = RETRY_SECONDS[0]
            except ApiError as error:
                self._record_activity(response=False)
                if error.status == GONE:
                    log.info("the watch of %s has expired; listing again", self._path)
                    self._must_list = True
                    continue
                log.warning("cannot watch %s; retrying in %.1f s: %s", self._path, wait, error)
                # Random, so that the watches of all operators do not reconnect at the same time.
                await asyncio.sleep(error.retry_after_seconds or wait * random.uniform(0.5, 1))  # noqa: S311
                wait = min(2 * wait, RETRY_SECONDS[1])

    async def _list(self) -> None:
        found: list[tuple[ObjectKey, Entry[T]]] = []
        version = 0
        query = {**self._source.query, "limit": PAGE_OBJECTS}
        async with aclosing(iterate_pages(self._api, self._path, query, self._source.list_accept)) as pages:
            async for page in pages:
                version = int(page["metadata"]["resourceVersion"])
                found += [item for item in map(self._read, page.get("items") or ()) if item is not None]
                self._record_activity()
        self._cache.replace(self._scope, found, version)
        self._must_list = False
        self.synced.set()

    async def _watch(self) -> None:
        query = {
            **self._source.query,
            "resourceVersion": str(self._cache.synced_version(self._scope)),
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(*WATCH_SECONDS)),  # noqa: S311
        }
        async with aclosing(self._api.watch(self._path, query, self._source.watch_accept)) as events:
            async for event in events:
                self._record_activity()
                self._apply_event(event["type"], event["object"])
        self._record_activity()

    def _apply_event(self, kind: str, thing: Json) -> None:
        if kind == "ERROR":
            raise ApiError(thing.get("code", 0), thing.get("reason", ""), thing.get("message", ""))
        version = int(thing["metadata"]["resourceVersion"])
        if kind == "BOOKMARK":
            self._cache.advance(self._scope, version)
            return
        if kind != "DELETED" and self._cache.has_version(object_key(thing), version):
            # A write of this replica, which was cached from its response.
            self._cache.advance(self._scope, version)
            return
        item = self._read(thing) if kind != "DELETED" else None
        if item is None:
            self._cache.delete(self._scope, object_key(thing), version)
        else:
            self._cache.update(self._scope, *item)

    def _read(self, thing: Json) -> tuple[ObjectKey, Entry[T]] | None:
        value = self._source.decode(thing)
        return None if value is None else (object_key(thing), Entry(int(thing["metadata"]["resourceVersion"]), value))

    def _record_activity(self, *, response: bool = True) -> None:
        self.last_activity_at = asyncio.get_running_loop().time()
        if response:
            self.last_response_at = self.last_activity_at


def object_key(thing: Json) -> ObjectKey:
    """Return the key of an object."""
    meta = thing["metadata"]
    return ObjectKey(meta.get("namespace", ""), meta["name"])
