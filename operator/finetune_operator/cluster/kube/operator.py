"""Puts the parts of the operator together, and says in which order they live.

A replica waits for the lease with nothing in its hands; one that gets it lists, watches, listens and works: a `Term`.
One that loses it drops all of that and waits again. So taking over is the same as starting, and there is one way to do
it (docs/adr/0005-a-standby-holds-nothing.md).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_operator.api import names
from finetune_operator.cluster.kube.beats.endpoint import SecureCoordinator
from finetune_operator.cluster.kube.client import objects
from finetune_operator.cluster.kube.client.client import (
    PARTIAL,
    PARTIAL_LIST,
    KubeApi,
    RequestHook,
    SetupError,
    connect,
)
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.client.events import EventSender
from finetune_operator.cluster.kube.cluster import KubeCluster, Pace, World
from finetune_operator.cluster.kube.leader.endpoint_slice import Endpoint, publish
from finetune_operator.cluster.kube.leader.lease import Elector, LeaseOptions
from finetune_operator.cluster.kube.tls.context import LOOK_SECONDS, ServerCertificate
from finetune_operator.cluster.kube.tls.keeper import CertificateKeeper
from finetune_operator.cluster.kube.watch.nodes import NodeBook
from finetune_operator.cluster.kube.watch.reflector import Reflector, Source
from finetune_operator.cluster.kube.work.queue import WorkQueue
from finetune_operator.cluster.kube.work.workers import Passes, PassWatcher, Workers
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
    authority: Path | None = None
    """The authority that the certificate is from, for the supervisors; None: they know it by themselves."""
    secret: str = ""
    """Secret in which the operator keeps an authority and a certificate of its own, in place of those files."""
    hosts: tuple[str, ...] = ()
    """Names that its own certificate is for."""
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
    num_workers: int = 32
    lease: LeaseOptions | None = None
    """None: no other replica runs."""
    coordinator: CoordinatorOptions | None = None
    """None: no beats are taken."""
    pace: Pace = field(default_factory=Pace)


@dataclass(frozen=True)
class Shared:
    """What a replica has before it leads, and keeps when it leads no more."""

    options: OperatorOptions
    settings: Settings
    watcher: PassWatcher
    api: KubeApi
    clock: ServerClock
    nodes: NodeBook
    certificate: ServerCertificate | None


class Term:
    """One time of leading: its caches, its queue, its endpoint. Nothing of it is used again."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        options, settings = shared.options, shared.settings
        self.queue: WorkQueue[JobKey] = WorkQueue()
        self._events = EventSender(
            shared.api, shared.clock, options.identity, busy=lambda: self.queue.depth > options.num_workers
        )
        world = World(shared.api, self.queue, self._events, shared.clock, shared.nodes)
        self.cluster = KubeCluster(world, settings, options.pace)
        passes = Passes(self.cluster, self.queue, settings, shared.clock, shared.watcher)
        self._workers = Workers(passes, options.num_workers)
        self._coordinator = SecureCoordinator(self.cluster, shared.clock)
        self._reflectors = [
            Reflector(shared.api, source, cache, scope)
            for source, cache in _sources(self.cluster)
            for scope in options.namespaces or ("",)
        ]
        self.works = False
        """Whether its caches are complete and passes are made."""
        self._finished = asyncio.Event()

    async def run(self) -> None:
        """List and watch, listen, work; until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for reflector in self._reflectors:
                    tasks.create_task(reflector.run())
                # A pass decides from all caches: one that is not complete yet would look like lost pods.
                for reflector in self._reflectors:
                    await reflector.synced.wait()
                log.info("%d jobs and %d pods are known", len(self.cluster.jobs), len(self.cluster.pods))
                await self._listen(tasks)
                tasks.create_task(self._events.run())
                self.works = True
                await self._workers.run()
                self._finished.set()
                # The queue is closed: what is left waits for its end.
                await asyncio.Event().wait()
        finally:
            self.works = False
            await self._coordinator.stop()

    async def finish(self) -> None:
        """Begin no more passes, and wait for those that are under way."""
        self.queue.close()
        if self.works:
            with suppress(TimeoutError):
                async with asyncio.timeout(FINISH_SECONDS):
                    await self._finished.wait()

    def is_alive(self, now: float) -> bool:
        """Whether all its tasks show signs of life."""
        listening = all(now - reflector.tried_at < DEAD_SECONDS for reflector in self._reflectors)
        return not self.works or (listening and self._workers.longest_pass_seconds(now) < DEAD_SECONDS)

    def is_fresh(self, now: float) -> bool:
        """Whether it knows the present."""
        return self.works and all(now - reflector.fresh_at < STALE_SECONDS for reflector in self._reflectors)

    async def _listen(self, tasks: asyncio.TaskGroup) -> None:
        options, certificate = self._shared.options.coordinator, self._shared.certificate
        if options is None:
            return
        if options.secret:
            certificate = await self._own_certificate(options, tasks)
        elif options.authority is not None:
            self.cluster.authority = options.authority.read_text()
            tasks.create_task(self._follow_authority(options.authority))
        context = None
        if certificate is not None:
            context = certificate.context
            tasks.create_task(certificate.follow())
        port = await self._coordinator.start(options.host, options.port, context)
        log.info("taking beats on port %d%s", port, "" if context else ", without TLS")
        if options.service:
            await publish(self._shared.api, Endpoint(options.namespace, options.service, options.address, port))

    async def _own_certificate(self, options: CoordinatorOptions, tasks: asyncio.TaskGroup) -> ServerCertificate:
        keeper = CertificateKeeper(
            self._shared.api, options.namespace, options.secret, options.hosts, self._shared.clock
        )
        await keeper.load()

        def tell(bundle: str) -> None:
            self.cluster.authority = bundle
            tasks.create_task(self.cluster.tell_authority())

        # Those of a leader before this one may not have heard of it all.
        tell(keeper.bundle)
        tasks.create_task(keeper.follow(tell))
        return ServerCertificate(keeper.certificate, keeper.key)

    async def _follow_authority(self, path: Path) -> None:
        """Tell the jobs of an authority that is in a file, and of each change."""
        told = ""
        while True:
            if self.cluster.authority != told:
                told = self.cluster.authority
                await self.cluster.tell_authority()
            await asyncio.sleep(LOOK_SECONDS)
            with suppress(OSError):
                self.cluster.authority = await asyncio.to_thread(path.read_text)


class Operator:
    """One replica; `prepare`, `start`, then `stop`."""

    def __init__(
        self, options: OperatorOptions, settings: Settings, watcher: PassWatcher, hooks: tuple[RequestHook, ...] = ()
    ) -> None:
        self._options = options
        self._settings = settings
        self._watcher = watcher
        self._hooks = hooks
        self._elector: Elector | None = None
        self._life: asyncio.Task[None] | None = None
        self.nodes = NodeBook(self._node_changed)
        self.term: Term | None = None
        """The present time of leading; None while it waits for the lease."""
        self.failed = False
        """Whether it cannot go on; the log says why."""
        self.ended = asyncio.Event()
        """Set when it has failed, and when it has stopped."""

    async def prepare(self) -> None:
        """Read the credentials and the certificate; nothing is sent yet.

        Raises:
            SetupError: one of them cannot be read.
        """
        options, clock = self._options, ServerClock()
        certificate = _certificate(options.coordinator)
        self.client = await connect(options.kubeconfig, options.context)
        self.client.user_agent = f"{names.OPERATOR}/{options.identity}"
        self._api = KubeApi(self.client, clock, self._hooks)
        if options.lease is not None:
            self._elector = Elector(self._api, options.lease, clock)
            self._api.may_write = self._elector.may_write
        self._shared = Shared(options, self._settings, self._watcher, self._api, clock, self.nodes, certificate)

    async def start(self) -> None:
        """Begin to wait for the lease."""
        self._life = asyncio.create_task(self._live(self._shared))
        self._life.add_done_callback(self._life_ended)

    async def stop(self) -> None:
        """Finish the passes that are under way, give the lease back, and end."""
        if self.term is not None:
            await self.term.finish()
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        if self._elector is not None:
            await self._elector.release()
        await self._api.close()
        self.ended.set()

    @property
    def leads(self) -> bool:
        """Whether this replica has the lease, its caches and its endpoint."""
        return self.term is not None and self.term.works

    def is_alive(self) -> bool:
        """Answer a liveness probe."""
        return not self.failed and (self.term is None or self.term.is_alive(asyncio.get_running_loop().time()))

    def is_ready(self) -> bool:
        """Answer a readiness probe. A replica that waits for the lease is ready to take over."""
        return not self.failed and (self.term is None or self.term.is_fresh(asyncio.get_running_loop().time()))

    async def _live(self, shared: Shared) -> None:
        """Lead whenever the lease is ours."""
        while True:
            if self._elector is not None:
                await self._elector.acquire()
            self.term = Term(shared)
            work = asyncio.create_task(self.term.run())
            hold = asyncio.create_task(self._elector.hold() if self._elector else asyncio.Event().wait())
            try:
                await asyncio.wait({work, hold}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    await work
            finally:
                for task in (work, hold):
                    task.cancel()
                await asyncio.gather(work, hold, return_exceptions=True)
                self.term = None

    def _node_changed(self, name: str) -> None:
        if self.term is not None:
            self.term.cluster.node_changed(name)

    def _life_ended(self, life: asyncio.Task[None]) -> None:
        if life.cancelled():
            return
        log.critical("the operator cannot go on", exc_info=life.exception())
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
    try:
        return ServerCertificate(options.certificate, options.key)
    except (OSError, ssl.SSLError) as error:
        raise SetupError(f"cannot load the coordinator's certificate {options.certificate}: {error}") from error
