"""Puts the parts of the operator together, and says in which order they live.

A replica waits for the lease with nothing in its hands; one that gets it lists, watches, listens and works. So taking
over is the same as starting, and there is one way to do it. A replica that loses the lease ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_operator.cluster.kube import objects
from finetune_operator.cluster.kube.client import PARTIAL, PARTIAL_LIST, KubeApi, RequestHook, connect
from finetune_operator.cluster.kube.clock import ServerClock
from finetune_operator.cluster.kube.cluster import KubeCluster, Pace, World
from finetune_operator.cluster.kube.coordinator import SecureCoordinator
from finetune_operator.cluster.kube.endpoint import Endpoint, publish
from finetune_operator.cluster.kube.events import EventSender
from finetune_operator.cluster.kube.lease import Elector, LeaseOptions
from finetune_operator.cluster.kube.queue import WorkQueue
from finetune_operator.cluster.kube.reflector import Reflector, Source
from finetune_operator.cluster.kube.tls import ServerCertificate
from finetune_operator.cluster.kube.workers import Passes, PassWatcher, Workers
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

DEAD_SECONDS = 400.0
"""A watch, or a pass, without any sign of life for so long will not come back by itself."""
STALE_SECONDS = 200.0
"""A watch that the server has not spoken on for so long knows nothing of the present."""
FINISH_SECONDS = 20.0
"""How long passes that are under way may take when the operator stops."""


@dataclass(frozen=True)
class CoordinatorOptions:
    """Where beats are taken."""

    host: str = "0.0.0.0"  # noqa: S104  it serves pods of all nodes
    port: int = 8443
    certificate: Path | None = None
    key: Path | None = None
    namespace: str = ""
    service: str = ""
    """Service without a selector that leads to the replica that leads; empty: nobody is told where it is."""
    address: str = ""
    """This replica's address in that service."""


@dataclass(frozen=True)
class OperatorOptions:
    """How this process works; `Settings` say what becomes of jobs."""

    identity: str
    kubeconfig: Path | None = None
    context: str | None = None
    namespaces: tuple[str, ...] = ()
    """Namespaces to look after; empty: all."""
    num_workers: int = 16
    lease: LeaseOptions | None = None
    """None: no other replica runs."""
    coordinator: CoordinatorOptions | None = None
    """None: no beats are taken."""
    pace: Pace = field(default_factory=Pace)


class Operator:
    """The running operator; `start`, then `stop`."""

    def __init__(
        self, options: OperatorOptions, settings: Settings, watcher: PassWatcher, hooks: tuple[RequestHook, ...] = ()
    ) -> None:
        self._options = options
        self._settings = settings
        self._watcher = watcher
        self._hooks = hooks
        self._tasks: set[asyncio.Task[None]] = set()
        self._reflectors: list[Reflector[Any]] = []
        self._work: asyncio.Task[None] | None = None
        self.leads = False
        """Whether this replica has the lease, its caches and its endpoint."""
        self.failed = False
        """Whether it cannot go on; the log says why."""
        self.ended = asyncio.Event()
        """Set when it has failed, and when it has stopped."""

    async def start(self) -> None:
        """Connect, and begin to wait for the lease.

        Raises:
            ConfigException: there are no credentials for an API server.
            OSError, ssl.SSLError: the coordinator's certificate cannot be read.
        """
        options = self._options
        clock = ServerClock()
        self.client = await connect(options.kubeconfig, options.context)
        self.api = KubeApi(self.client, clock, self._hooks)
        self.queue: WorkQueue[JobKey] = WorkQueue()
        self._events = EventSender(self.api, clock, options.identity)
        self.cluster = KubeCluster(World(self.api, self.queue, self._events, clock), self._settings, options.pace)
        self._workers = Workers(
            Passes(self.cluster, self.queue, self._settings, clock, self._watcher), options.num_workers
        )
        self._coordinator = SecureCoordinator(self.cluster, clock)
        self._elector = Elector(self.api, options.lease, clock) if options.lease else None
        self._certificate = _certificate(options.coordinator)
        self._spawn(self._live(), "operator")

    async def stop(self) -> None:
        """Finish the passes that are under way, give the lease back, and end."""
        self.queue.close()
        if self._work is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(FINISH_SECONDS):
                    await asyncio.wait([self._work])
        self.leads = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._coordinator.stop()
        if self._elector is not None:
            await self._elector.release()
        await self.api.close()
        self.ended.set()

    def is_alive(self) -> bool:
        """Whether all tasks show signs of life: the answer to a liveness probe."""
        now = asyncio.get_running_loop().time()
        if self.failed or not self.leads:
            return not self.failed
        listening = all(now - reflector.tried_at < DEAD_SECONDS for reflector in self._reflectors)
        return listening and self._workers.longest_pass_seconds(now) < DEAD_SECONDS

    def is_ready(self) -> bool:
        """Whether it knows the present: the answer to a readiness probe. One that waits for the lease need not."""
        now = asyncio.get_running_loop().time()
        return self.is_alive() and all(now - reflector.fresh_at < STALE_SECONDS for reflector in self._reflectors)

    async def _live(self) -> None:
        """From the lease to the work, until the lease is lost."""
        if self._elector is not None:
            await self._elector.acquire()
            self.api.may_write = self._elector.may_write
            self._spawn(self._hold(self._elector), "lease")
        self._reflectors = [
            Reflector(self.api, source, cache, scope)
            for source, cache in _sources(self.cluster)
            for scope in self._options.namespaces or ("",)
        ]
        for reflector in self._reflectors:
            self._spawn(reflector.run(), "reflector")
        # A pass decides from all caches: one that is not complete yet would look like lost pods.
        for reflector in self._reflectors:
            await reflector.synced.wait()
        log.info("%d jobs and %d pods are known", len(self.cluster.jobs), len(self.cluster.pods))
        await self._listen()
        self._spawn(self._events.run(), "events")
        self._work = self._spawn(self._workers.run(), "workers")
        self.leads = True

    async def _hold(self, elector: Elector) -> None:
        await elector.hold()
        raise RuntimeError("another replica may be leading")

    async def _listen(self) -> None:
        options = self._options.coordinator
        if options is None:
            return
        context = None
        if self._certificate is not None:
            context = self._certificate.context
            self._spawn(self._certificate.follow(), "certificate")
        port = await self._coordinator.listen(options.host, options.port, context)
        log.info("taking beats on port %d%s", port, "" if context else ", without TLS")
        if options.service:
            await publish(self.api, Endpoint(options.namespace, options.service, options.address, port))

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task; where it breaks, the operator cannot go on."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.critical("%s: %s", task.get_name(), error, exc_info=error)
        self.failed = True
        self.ended.set()


def _sources(cluster: KubeCluster) -> list[tuple[Source[Any], Any]]:
    """What is watched, and the cache that it fills."""
    owned = {"labelSelector": objects.OWNED}
    partial = {"query": owned, "list_accept": PARTIAL_LIST, "watch_accept": PARTIAL}
    return [
        (Source(objects.JOBS, objects.decode_job), cluster.jobs),
        (Source(objects.PODS, objects.decode_pod, query=owned), cluster.pods),
        (Source(objects.SERVICES, objects.decode_child, **partial), cluster.services),  # type: ignore[arg-type]
        (Source(objects.CONFIGS, objects.decode_child, **partial), cluster.configs),  # type: ignore[arg-type]
    ]


def _certificate(options: CoordinatorOptions | None) -> ServerCertificate | None:
    if options is None or options.certificate is None or options.key is None:
        return None
    return ServerCertificate(options.certificate, options.key)
