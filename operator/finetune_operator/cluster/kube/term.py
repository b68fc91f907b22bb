"""One term of leadership: the caches, the work queue, the workers and the heartbeat endpoint of a leading replica.

`operator` creates a term when the replica gets the lease and drops it when the lease is lost. Nothing of a term is used
again, so a takeover is the same as a start (docs/adr/0005-a-standby-holds-nothing.md).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.kube.beats.coordinator import RateLimitedCoordinator
from finetune_operator.cluster.kube.client import objects
from finetune_operator.cluster.kube.client.client import PARTIAL, PARTIAL_LIST, ApiError, KubeApi, SetupError
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.client.events import EventSender
from finetune_operator.cluster.kube.cluster import KubeCluster
from finetune_operator.cluster.kube.dependencies import ClusterDependencies
from finetune_operator.cluster.kube.leader.endpoint_slice import EndpointPublisher, LeaderEndpoint
from finetune_operator.cluster.kube.optional.children import KINDS, api_version, decoder, optional_resources
from finetune_operator.cluster.kube.optional.discovery import try_find_served, wait_until_served
from finetune_operator.cluster.kube.optional.evictions import EVICTIONS, eviction_source, names_responders
from finetune_operator.cluster.kube.options import CoordinatorOptions, OperatorOptions
from finetune_operator.cluster.kube.queue.workloads import FLAVORS, WORKLOADS, decode_flavor, decode_workload
from finetune_operator.cluster.kube.tls.context import CHECK_SECONDS, ServerCertificate
from finetune_operator.cluster.kube.tls.manager import CertificateManager
from finetune_operator.cluster.kube.watch.nodes import NodeStates
from finetune_operator.cluster.kube.watch.reflector import Reflector, WatchSource
from finetune_operator.cluster.kube.work.node_taints import NodeTainter
from finetune_operator.cluster.kube.work.queue import WorkQueue
from finetune_operator.cluster.kube.work.workers import ReconcileObserver, WorkerContext, Workers
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.coordinator.listener import ConnectionLimits
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

UNRESPONSIVE_SECONDS = 400.0
"""A watch or a reconcile without any activity for longer does not recover without a restart."""
STALE_SECONDS = 200.0
"""The cache of a watch without any response for longer is out of date."""
MIN_IDLE_SECONDS = 60.0
"""Minimum time for which a connection without heartbeats is kept."""
FINISH_SECONDS = 20.0
"""Time limit for running reconciles when the operator stops."""


@dataclass(frozen=True)
class ReplicaContext:
    """Objects that a replica has before it leads and keeps afterwards."""

    options: OperatorOptions
    settings: Settings
    observer: ReconcileObserver
    api: KubeApi
    clock: ServerClock
    nodes: NodeStates
    certificate: ServerCertificate | None


class LeaderTerm:
    """One term of leadership."""

    def __init__(self, replica: ReplicaContext) -> None:
        self._replica = replica
        options, settings = replica.options, replica.settings
        self.queue: WorkQueue[JobKey] = WorkQueue()
        self._events = EventSender(
            replica.api, replica.clock, options.identity, busy=lambda: self.queue.depth > options.num_workers
        )
        dependencies = ClusterDependencies(replica.api, self.queue, self._events, replica.clock, replica.nodes)
        self.cluster = KubeCluster(dependencies, settings, options.limits)
        context = WorkerContext(self.cluster, self.queue, settings, replica.clock, replica.observer)
        self._workers = Workers(context, options.num_workers)
        self._coordinator = RateLimitedCoordinator(
            self.cluster.beats,
            self.cluster.authenticate_token,
            self.cluster.answer_heartbeat,
            replica.clock,
            self.cluster.changes,
        )
        self._reflectors = [
            Reflector(replica.api, source, cache, scope)
            for source, cache in _watch_sources(self.cluster, delegates=settings.kueue)
            for scope in options.namespaces or ("",)
        ]
        self._endpoint: EndpointPublisher | None = None
        self.active = False
        """Whether the caches are complete and jobs are reconciled."""
        self._finished = asyncio.Event()

    async def run(self) -> None:
        """List, watch, listen and reconcile until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for reflector in self._reflectors:
                    tasks.create_task(reflector.run())
                await self._watch_queues(tasks)
                await self._watch_optional(tasks)
                await self._watch_evictions(tasks)
                # A reconcile reads all caches: missing entries of an incomplete cache would look like lost pods.
                for reflector in self._reflectors:
                    await reflector.synced.wait()
                log.info("caches are synced: %d jobs, %d pods", len(self.cluster.jobs), len(self.cluster.pods))
                await self._listen(tasks)
                tasks.create_task(self.cluster.attention.watch())
                tasks.create_task(self._events.run())
                if self._replica.options.taint_after_jobs:
                    tasks.create_task(self._make_tainter().watch())
                self.active = True
                await self._workers.run()
                self._finished.set()
                # The queue is closed: wait until this task is cancelled.
                await asyncio.Event().wait()
        finally:
            self.active = False
            await self._coordinator.stop()

    def _make_tainter(self) -> NodeTainter:
        def jobs() -> list[FineTuneJob]:
            return [stored.job for stored in self.cluster.jobs.values() if stored.job is not None]

        replica = self._replica
        return NodeTainter(replica.api, jobs, replica.clock, replica.options.taint_after_jobs)

    async def _watch_queues(self, tasks: asyncio.TaskGroup) -> None:
        """Watch Kueue's objects if the settings allow it; without its API, look for it from time to time."""
        workloads = self.cluster.workloads
        if not self._replica.settings.kueue:
            return
        try:
            served = await workloads.discover()
        except ApiError as error:
            log.warning("cannot ask for Kueue's API: %s", error)
            served = False
        if served:
            await self._follow_queues(tasks)
        else:
            tasks.create_task(self._await_queues(tasks))

    async def _await_queues(self, tasks: asyncio.TaskGroup) -> None:
        await self.cluster.workloads.wait_until_served()
        log.info("Kueue's API is served now")
        await self._follow_queues(tasks)

    async def _follow_queues(self, tasks: asyncio.TaskGroup) -> None:
        """Fill the caches of Kueue's objects, and keep them up to date."""
        workloads, owned = self.cluster.workloads, {"labelSelector": objects.OWNED_SELECTOR}
        reflectors: list[Reflector[Any]] = [
            Reflector(self._replica.api, WatchSource(WORKLOADS, decode_workload, query=owned), workloads.cache, scope)
            for scope in self._replica.options.namespaces or ("",)
        ]
        reflectors.append(Reflector(self._replica.api, WatchSource(FLAVORS, decode_flavor), workloads.flavors))
        for reflector in reflectors:
            tasks.create_task(reflector.run())
        for reflector in reflectors:
            await reflector.synced.wait()
        self._reflectors += reflectors
        workloads.set_served()

    async def _watch_optional(self, tasks: asyncio.TaskGroup) -> None:
        """Watch the optional objects that the settings allow; look for missing APIs from time to time."""
        for candidates in optional_resources(self._replica.settings):
            found = await try_find_served(self._replica.api, candidates)
            if found is not None:
                await self._follow_optional(tasks, found)
            else:
                tasks.create_task(self._await_optional(tasks, candidates))

    async def _watch_evictions(self, tasks: asyncio.TaskGroup) -> None:
        """Watch Evictions if the settings allow it, and the API server serves them now or later."""
        if not self._replica.settings.eviction_requests:
            return
        if await try_find_served(self._replica.api, (EVICTIONS,)) is not None:
            await self._follow_evictions(tasks)
        else:
            tasks.create_task(self._await_evictions(tasks))

    async def _await_evictions(self, tasks: asyncio.TaskGroup) -> None:
        await wait_until_served(self._replica.api, (EVICTIONS,))
        await self._follow_evictions(tasks)

    async def _follow_evictions(self, tasks: asyncio.TaskGroup) -> None:
        replica, evictions = self._replica, self.cluster.evictions
        log.info("the cluster serves %s", EVICTIONS.root)
        reflectors = [
            Reflector(replica.api, eviction_source(), evictions.cache, scope)
            for scope in replica.options.namespaces or ("",)
        ]
        for reflector in reflectors:
            tasks.create_task(reflector.run())
        for reflector in reflectors:
            await reflector.synced.wait()
        self._reflectors += reflectors
        try:
            evictions.pods_name_responders = await names_responders(replica.api)
        except ApiError as error:
            log.warning("cannot ask for the version of the cluster; pods name no responders of evictions: %s", error)

    async def _await_optional(self, tasks: asyncio.TaskGroup, candidates: tuple[objects.Resource, ...]) -> None:
        await self._follow_optional(tasks, await wait_until_served(self._replica.api, candidates))

    async def _follow_optional(self, tasks: asyncio.TaskGroup, resource: objects.Resource) -> None:
        """Fill the cache of an optional resource, and keep it up to date."""
        optional, version = self.cluster.optional, api_version(resource)
        log.info("the cluster serves %s of %s", resource.plural, version)
        cache = optional.add(resource)
        query = {"labelSelector": objects.OWNED_SELECTOR}
        source = WatchSource(
            resource,
            decoder(version, KINDS[resource.plural]),
            query=query,
            list_accept=PARTIAL_LIST,
            watch_accept=PARTIAL,
        )
        reflectors: list[Reflector[Any]] = [
            Reflector(self._replica.api, source, cache, scope) for scope in self._replica.options.namespaces or ("",)
        ]
        for reflector in reflectors:
            tasks.create_task(reflector.run())
        for reflector in reflectors:
            await reflector.synced.wait()
        self._reflectors += reflectors
        optional.set_synced(resource)

    async def finish(self) -> None:
        """Start no more reconciles, and wait for those that are running."""
        self.queue.close()
        if self.active:
            with suppress(TimeoutError):
                async with asyncio.timeout(FINISH_SECONDS):
                    await self._finished.wait()

    def is_alive(self, now: float) -> bool:
        """Return whether all tasks make progress."""
        listening = all(now - reflector.last_activity_at < UNRESPONSIVE_SECONDS for reflector in self._reflectors)
        return not self.active or (listening and self._workers.longest_reconcile_seconds(now) < UNRESPONSIVE_SECONDS)

    def is_fresh(self, now: float) -> bool:
        """Return whether the caches are up to date and heartbeats can arrive."""
        reachable = self._endpoint is None or not self._endpoint.problem
        fresh = all(now - reflector.last_response_at < STALE_SECONDS for reflector in self._reflectors)
        return self.active and reachable and fresh

    async def _listen(self, tasks: asyncio.TaskGroup) -> None:
        options, certificate = self._replica.options.coordinator, self._replica.certificate
        if options is None:
            return
        if options.secret:
            certificate = await self._own_certificate(options, tasks)
        elif options.authority is not None:
            self.cluster.authority = read_authority(options.authority)
            tasks.create_task(self._watch_authority(options.authority))
        context = None
        if certificate is not None:
            context = certificate.context
            tasks.create_task(certificate.reload_on_change())
        limits = connection_limits(options, self._replica.settings)
        try:
            port = await self._coordinator.start(options.host, options.port, context, limits)
        except OSError as error:
            raise SetupError(
                f"cannot receive heartbeats on port {options.port}: {error}; set another --coordinator-port"
            ) from error
        log.info("receiving heartbeats on port %d%s", port, "" if context else " without TLS")
        if options.service:
            endpoint = LeaderEndpoint(options.namespace, options.service, options.address, port)
            self._endpoint = EndpointPublisher(self._replica.api, endpoint)
            await self._endpoint.publish()
            tasks.create_task(self._endpoint.keep())

    async def _own_certificate(self, options: CoordinatorOptions, tasks: asyncio.TaskGroup) -> ServerCertificate:
        manager = CertificateManager(
            self._replica.api, options.namespace, options.secret, options.hosts, self._replica.clock
        )
        await manager.load()

        def distribute(bundle: str) -> None:
            self.cluster.authority = bundle
            tasks.create_task(self.cluster.distribute_authority())

        # A previous leader may have stopped before it had updated all ConfigMaps.
        distribute(manager.bundle)
        tasks.create_task(manager.renew_periodically(distribute))
        return ServerCertificate(manager.certificate, manager.key)

    async def _watch_authority(self, path: Path) -> None:
        """Distribute the certificate authority in a file to the jobs, again after each change."""
        distributed = ""
        while True:
            if self.cluster.authority != distributed:
                distributed = self.cluster.authority
                await self.cluster.distribute_authority()
            await asyncio.sleep(CHECK_SECONDS)
            with suppress(OSError):
                self.cluster.authority = await asyncio.to_thread(path.read_text)


def connection_limits(options: CoordinatorOptions, settings: Settings) -> ConnectionLimits:
    """Return the limits of the coordinator's port: a supervisor keeps its connection between two heartbeats."""
    idle_seconds = max(MIN_IDLE_SECONDS, 2 * max(settings.beat_seconds, settings.beat_timeout_seconds))
    return ConnectionLimits(total=options.max_connections, idle_seconds=idle_seconds)


def read_authority(path: Path) -> str:
    """Return the certificate authority in a file, as PEM.

    Raises:
        SetupError: the file cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise SetupError(
            f"cannot read the authority of the coordinator's certificate {path}: {error}; "
            "the Secret of the certificate needs a key ca.crt"
        ) from error


def _watch_sources(cluster: KubeCluster, *, delegates: bool) -> list[tuple[WatchSource[Any], Any]]:
    """Return each watched collection with the cache that it fills."""
    owned = {"labelSelector": objects.OWNED_SELECTOR}
    metadata = {"query": owned, "list_accept": PARTIAL_LIST, "watch_accept": PARTIAL}
    return [
        (WatchSource(objects.JOBS, partial(objects.decode_job, delegates=delegates)), cluster.jobs),
        (WatchSource(objects.PODS, objects.decode_pod, query=owned), cluster.pods),
        (WatchSource(objects.SERVICES, objects.decode_child, **metadata), cluster.services),  # type: ignore[arg-type]
        (WatchSource(objects.CONFIGS, objects.decode_child, **metadata), cluster.configs),  # type: ignore[arg-type]
    ]
