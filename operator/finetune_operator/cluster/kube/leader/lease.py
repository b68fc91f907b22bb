"""Who may write: one Lease, held by one replica at a time.

A replica never compares its clock with another one's: it takes a lease over when it has seen it unchanged for the
lease's length, and stops writing `RENEW_MARGIN` of that length before anybody else may take over. `Tenure` is pure.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import Any

from finetune_operator.cluster.kube.client.client import CONFLICT, NOT_FOUND, ApiError, Json, KubeApi
from finetune_operator.cluster.kube.client.objects import LEASES
from finetune_operator.cluster.protocol import Clock

log = logging.getLogger(__name__)

RENEW_MARGIN = 1 / 3
"""Share of the lease's length that a holder leaves between its last write and its end."""
RETRIES_PER_LEASE = 7
"""Looks at the lease within its length."""


@dataclass(frozen=True)
class LeaseOptions:
    """Which lease, and for whom."""

    namespace: str
    name: str
    identity: str
    """Unique for this process: a restarted pod is not its predecessor."""
    seconds: float = 15.0


class Tenure:
    """What one replica knows of the lease, in its own time."""

    def __init__(self, identity: str, seconds: float) -> None:
        self._identity = identity
        self._seconds = seconds
        self._record: tuple[str, str] | None = None
        self._changed_at = 0.0
        self._renewed_at: float | None = None

    def see(self, holder: str, version: str, now: float) -> None:
        """Take what was read."""
        if self._record != (holder, version):
            self._record = (holder, version)
            self._changed_at = now

    def renew(self, now: float) -> None:
        """A renewal, sent at `now`, was taken."""
        self._renewed_at = now

    def lose(self) -> None:
        """Another replica holds it."""
        self._renewed_at = None

    def may_write(self, now: float) -> bool:
        """Whether nobody else can hold it, nor will while a write of now is under way."""
        return self._renewed_at is not None and now < self._renewed_at + self._seconds * (1 - RENEW_MARGIN)

    def may_take(self, now: float) -> bool:
        """Whether it is free, ours, or left by a replica that renews it no more."""
        if self._record is None:
            return False
        holder = self._record[0]
        return holder in ("", self._identity) or now >= self._changed_at + self._seconds


class Elector:
    """Takes the lease, renews it, gives it back."""

    def __init__(self, api: KubeApi, options: LeaseOptions, wall: Clock) -> None:
        self._api = api
        self._options = options
        self._wall = wall
        self._tenure = Tenure(options.identity, options.seconds)
        self._path = LEASES.path(options.namespace, options.name)
        self._lease: Json = {}

    def may_write(self) -> bool:
        """Whether this replica leads, at this moment."""
        return self._tenure.may_write(asyncio.get_running_loop().time())

    async def acquire(self) -> None:
        """Wait until the lease is ours."""
        log.info("waiting for the lease %s/%s", self._options.namespace, self._options.name)
        while not await self._try():
            await self._pause()
        log.info("leading as %s", self._options.identity)

    async def hold(self) -> None:
        """Renew the lease until it is lost."""
        while self.may_write():
            await self._pause()
            await self._try()
        log.error("the lease is lost: it could not be renewed in time")

    async def release(self) -> None:
        """Give the lease back, so that the next replica need not wait for its end."""
        if not self.may_write():
            return
        self._tenure.lose()
        try:
            await self._write(self._spec(holder=""))
        except ApiError as error:
            log.info("the lease could not be given back, and will run out: %s", error)

    async def _pause(self) -> None:
        # Spread, so that two replicas do not meet again and again.
        step = self._options.seconds / RETRIES_PER_LEASE
        await asyncio.sleep(step * random.uniform(0.8, 1.2))  # noqa: S311

    async def _try(self) -> bool:
        """Look at the lease; take it or renew it where we may. Say whether it is ours."""
        try:
            if not self.may_write():
                await self._read()
                if not self._tenure.may_take(asyncio.get_running_loop().time()):
                    return False
            # The lease runs from before the request: the server may have taken it at any moment since.
            started = asyncio.get_running_loop().time()
            await self._write(self._spec(holder=self._options.identity))
        except ApiError as error:
            if error.status == CONFLICT:
                self._tenure.lose()
                return False
            log.warning("cannot reach the lease: %s", error)
            return self.may_write()
        self._tenure.renew(started)
        return True

    async def _read(self) -> None:
        try:
            self._lease = await self._request("GET", self._path)
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise
            self._lease = {}
        holder = (self._lease.get("spec") or {}).get("holderIdentity") or ""
        version = self._lease.get("metadata", {}).get("resourceVersion", "")
        self._tenure.see(holder, version, asyncio.get_running_loop().time())

    async def _write(self, spec: dict[str, Any]) -> None:
        meta: Json = {"namespace": self._options.namespace, "name": self._options.name}
        body: Json = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": spec}
        if not self._lease:
            collection = LEASES.path(self._options.namespace)
            self._lease = await self._request("POST", collection, {**body, "metadata": meta})
            return
        # Labels and annotations are somebody else's: of whoever made it, such as a chart.
        found = self._lease["metadata"]
        meta |= {key: found[key] for key in ("resourceVersion", "labels", "annotations") if key in found}
        self._lease = await self._request("PUT", self._path, {**body, "metadata": meta})

    async def _request(self, method: str, path: str, body: Json | None = None) -> Json:
        # A request that hangs must not outlast the lease.
        seconds = self._options.seconds * RENEW_MARGIN
        return await self._api.request(method, path, body, seconds=seconds, unled=True)

    def _spec(self, holder: str) -> dict[str, Any]:
        old = self._lease.get("spec") or {}
        now = self._wall().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        changes = holder != old.get("holderIdentity") and bool(holder)
        return {
            "holderIdentity": holder,
            "leaseDurationSeconds": max(1, round(self._options.seconds)),
            "acquireTime": now if changes else old.get("acquireTime"),
            "renewTime": now,
            "leaseTransitions": old.get("leaseTransitions", 0) + (1 if changes and old else 0),
        }
