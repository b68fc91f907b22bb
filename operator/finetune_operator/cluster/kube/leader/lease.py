"""Leader election: one Lease, held by one replica at a time; only its holder may write.

A replica never compares its clock with another one's: it takes a lease over when it has observed no change for the
lease's duration, and it stops writing `RENEW_MARGIN` of that duration before another replica may take over.
`LeaseState` is pure.
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
"""Share of the lease's duration between a holder's last write and the end of the lease."""
RETRIES_PER_LEASE = 7
"""Attempts to acquire or renew the lease within its duration."""


@dataclass(frozen=True)
class LeaseOptions:
    """Name of the lease, and the identity of this replica."""

    namespace: str
    name: str
    identity: str
    """Unique for this process: a restarted pod has another identity."""
    seconds: float = 15.0


class LeaseState:
    """The lease as one replica has observed it, by its own clock."""

    def __init__(self, identity: str, seconds: float) -> None:
        self._identity = identity
        self._seconds = seconds
        self._record: tuple[str, str] | None = None
        self._changed_at = 0.0
        self._renewed_at: float | None = None

    def observe(self, holder: str, version: str, now: float) -> None:
        """Record what was read."""
        if self._record != (holder, version):
            self._record = (holder, version)
            self._changed_at = now

    def record_renewal(self, now: float) -> None:
        """Record a successful renewal that was sent at `now`."""
        self._renewed_at = now

    def record_loss(self) -> None:
        """Record that another replica holds the lease."""
        self._renewed_at = None

    def may_write(self, now: float) -> bool:
        """Return whether no other replica can hold the lease now or until a write of now is completed."""
        return self._renewed_at is not None and now < self._renewed_at + self._seconds * (1 - RENEW_MARGIN)

    def may_acquire(self, now: float) -> bool:
        """Return whether the lease is free, ours, or no longer renewed by its holder."""
        if self._record is None:
            return False
        holder = self._record[0]
        return holder in ("", self._identity) or now >= self._changed_at + self._seconds


class Elector:
    """Acquires, renews and releases the lease."""

    def __init__(self, api: KubeApi, options: LeaseOptions, wall: Clock) -> None:
        self._api = api
        self._options = options
        self._wall = wall
        self._state = LeaseState(options.identity, options.seconds)
        self._path = LEASES.path(options.namespace, options.name)
        self._lease: Json = {}

    def may_write(self) -> bool:
        """Return whether this replica is the leader now."""
        return self._state.may_write(asyncio.get_running_loop().time())

    async def acquire(self) -> None:
        """Wait until this replica holds the lease."""
        log.info("waiting for the lease %s/%s", self._options.namespace, self._options.name)
        while not await self._acquire_or_renew():
            await self._pause()
        log.info("acquired the lease; leading as %s", self._options.identity)

    async def hold(self) -> None:
        """Renew the lease until it is lost."""
        while self.may_write():
            await self._pause()
            await self._acquire_or_renew()
        log.error("lost the lease: it could not be renewed in time")

    async def release(self) -> None:
        """Release the lease, so that the next replica does not have to wait until it expires."""
        if not self.may_write():
            return
        self._state.record_loss()
        try:
            await self._write(self._spec(holder=""))
        except ApiError as error:
            log.info("cannot release the lease; it expires by itself: %s", error)

    async def _pause(self) -> None:
        # Random, so that two replicas do not collide repeatedly.
        step = self._options.seconds / RETRIES_PER_LEASE
        await asyncio.sleep(step * random.uniform(0.8, 1.2))  # noqa: S311

    async def _acquire_or_renew(self) -> bool:
        """Acquire the lease if it is free, or renew it; return whether this replica holds it."""
        try:
            if not self.may_write():
                await self._read()
                if not self._state.may_acquire(asyncio.get_running_loop().time()):
                    return False
            # The lease starts before the request: the server may process it at any moment after that.
            started = asyncio.get_running_loop().time()
            await self._write(self._spec(holder=self._options.identity))
        except ApiError as error:
            if error.status == CONFLICT:
                self._state.record_loss()
                return False
            log.warning("cannot reach the lease: %s", error)
            return self.may_write()
        self._state.record_renewal(started)
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
        self._state.observe(holder, version, asyncio.get_running_loop().time())

    async def _write(self, spec: dict[str, Any]) -> None:
        meta: Json = {"namespace": self._options.namespace, "name": self._options.name}
        body: Json = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": spec}
        if not self._lease:
            collection = LEASES.path(self._options.namespace)
            self._lease = await self._request("POST", collection, {**body, "metadata": meta})
            return
        # Keep labels and annotations of other tools, such as Helm.
        found = self._lease["metadata"]
        meta |= {key: found[key] for key in ("resourceVersion", "labels", "annotations") if key in found}
        self._lease = await self._request("PUT", self._path, {**body, "metadata": meta})

    async def _request(self, method: str, path: str, body: Json | None = None) -> Json:
        # The timeout is shorter than the lease, so that a request that hangs does not outlast it.
        seconds = self._options.seconds * RENEW_MARGIN
        return await self._api.request(method, path, body, seconds=seconds, without_lease=True)

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
