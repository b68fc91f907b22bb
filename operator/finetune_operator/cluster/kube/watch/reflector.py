"""Keeps a cache like the API server: lists once, then watches, and lists anew where the watch has expired.

Kopf's watch does not do for a cache: it tells neither when a list is complete nor of what was deleted while a watch
was expired (docs/adr/0004-caches-of-our-own.md).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from finetune_operator.cluster.kube.client.client import GONE, JSON, ApiError, Json, KubeApi, each_page
from finetune_operator.cluster.kube.client.objects import Resource
from finetune_operator.cluster.kube.watch.cache import Cache, Entry, ObjectKey

T = TypeVar("T")
log = logging.getLogger(__name__)

PAGE_OBJECTS = "250"
"""Objects in one page of a list: its JSON is in memory at once."""
WATCH_SECONDS = (240, 480)
"""Bounds of how long a watch lasts before it is made anew; a random time, so that they do not all end together."""
RETRY_SECONDS = (0.5, 5.0)
"""First and longest wait after an error."""


@dataclass(frozen=True)
class Source(Generic[T]):
    """What to list and watch, and how to read it."""

    resource: Resource
    decode: Callable[[Json], T | None]
    """From an object as JSON to what is kept of it; None: nothing."""
    query: dict[str, str] = field(default_factory=dict)
    """Selectors."""
    list_accept: str = JSON
    watch_accept: str = JSON


class Reflector(Generic[T]):
    """The task that keeps one cache, in one namespace or (where its scope is the empty text) in all of them."""

    def __init__(self, api: KubeApi, source: Source[T], cache: Cache[T], scope: str = "") -> None:
        self._api = api
        self._scope = scope
        self._path = source.resource.path(scope)
        self._must_list = True
        self._source = source
        self._cache = cache
        self.synced = asyncio.Event()
        """Set once the cache has held a whole list."""
        self.fresh_at = float("-inf")
        """When the server last said something, by the loop's clock."""
        self.tried_at = float("-inf")
        """When it was last listened to, whether it said something or not: a sign of life of this task."""

    async def run(self) -> None:
        """List and watch for ever."""
        wait = RETRY_SECONDS[0]
        while True:
            try:
                if self._must_list:
                    await self._list()
                await self._watch()
                wait = RETRY_SECONDS[0]
            except ApiError as error:
                self._touch(fresh=False)
                if error.status == GONE:
                    log.info("the watch of %s has expired; listing anew", self._path)
                    self._must_list = True
                    continue
                log.warning("cannot watch %s, trying again in %.1f s: %s", self._path, wait, error)
                # Spread, so that all watches of all operators do not come back in one moment.
                await asyncio.sleep(error.retry_after_seconds or wait * random.uniform(0.5, 1))  # noqa: S311
                wait = min(2 * wait, RETRY_SECONDS[1])

    async def _list(self) -> None:
        found: list[tuple[ObjectKey, Entry[T]]] = []
        version = 0
        query = {**self._source.query, "limit": PAGE_OBJECTS}
        async with aclosing(each_page(self._api, self._path, query, self._source.list_accept)) as pages:
            async for page in pages:
                version = int(page["metadata"]["resourceVersion"])
                found += [item for item in map(self._read, page.get("items") or ()) if item is not None]
                self._touch()
        self._cache.replace(self._scope, found, version)
        self._must_list = False
        self.synced.set()

    async def _watch(self) -> None:
        query = {
            **self._source.query,
            "resourceVersion": str(self._cache.seen(self._scope)),
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(*WATCH_SECONDS)),  # noqa: S311
        }
        async with aclosing(self._api.watch(self._path, query, self._source.watch_accept)) as events:
            async for event in events:
                self._touch()
                self._take(event["type"], event["object"])
        self._touch()

    def _take(self, kind: str, thing: Json) -> None:
        if kind == "ERROR":
            raise ApiError(thing.get("code", 0), thing.get("reason", ""), thing.get("message", ""))
        version = int(thing["metadata"]["resourceVersion"])
        if kind == "BOOKMARK":
            self._cache.see_version(self._scope, version)
            return
        if kind != "DELETED" and self._cache.knows(key_of(thing), version):
            # Our own write, which was read back from its answer.
            self._cache.see_version(self._scope, version)
            return
        item = self._read(thing) if kind != "DELETED" else None
        if item is None:
            self._cache.see_deleted(self._scope, key_of(thing), version)
        else:
            self._cache.see(self._scope, *item)

    def _read(self, thing: Json) -> tuple[ObjectKey, Entry[T]] | None:
        value = self._source.decode(thing)
        return None if value is None else (key_of(thing), Entry(int(thing["metadata"]["resourceVersion"]), value))

    def _touch(self, *, fresh: bool = True) -> None:
        self.tried_at = asyncio.get_running_loop().time()
        if fresh:
            self.fresh_at = self.tried_at


def key_of(thing: Json) -> ObjectKey:
    """The key of an object."""
    meta = thing["metadata"]
    return ObjectKey(meta.get("namespace", ""), meta["name"])
