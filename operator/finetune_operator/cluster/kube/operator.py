"""One replica of the operator: it acquires the lease, runs a term of leadership, and repeats when the lease is lost.

A replica that waits for the lease holds no caches and no endpoint (docs/adr/0005-a-standby-holds-nothing.md).
"""

from __future__ import annotations

import asyncio
import logging
import ssl

from finetune_operator.api import names
from finetune_operator.cluster.kube.client.client import KubeApi, RequestHook, SetupError, connect
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.leader.lease import Elector
from finetune_operator.cluster.kube.options import CoordinatorOptions, OperatorOptions
from finetune_operator.cluster.kube.term import LeaderTerm, ReplicaContext, read_authority
from finetune_operator.cluster.kube.tls.context import ServerCertificate
from finetune_operator.cluster.kube.watch.nodes import NodeStates
from finetune_operator.cluster.kube.work.workers import ReconcileObserver
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)


class Operator:
    """One replica. Call `prepare`, `start`, then `stop`."""

    def __init__(
        self,
        options: OperatorOptions,
        settings: Settings,
        observer: ReconcileObserver,
        hooks: tuple[RequestHook, ...] = (),
    ) -> None:
        self._options = options
        self._settings = settings
        self._observer = observer
        self._hooks = hooks
        self._elector: Elector | None = None
        self._task: asyncio.Task[None] | None = None
        self.nodes = NodeStates(self._node_changed)
        self.term: LeaderTerm | None = None
        """The current term of leadership; None while this replica waits for the lease."""
        self.failed = False
        """Whether an error stopped this replica; the log contains the error."""
        self.setup_failed = False
        """Whether that error is an invalid setup, so that a restart without a change does not help."""
        self.ended = asyncio.Event()
        """Set when the replica has failed or stopped."""

    async def prepare(self) -> None:
        """Read the credentials and the certificate; send no request.

        Raises:
            SetupError: one of them cannot be read.
        """
        options, clock = self._options, ServerClock()
        certificate = _load_certificate(options.coordinator)
        self.client = await connect(options.kubeconfig, options.context)
        self.client.user_agent = f"{names.OPERATOR}/{options.identity}"
        self._api = KubeApi(self.client, clock, self._hooks)
        if options.lease is not None:
            self._elector = Elector(self._api, options.lease, clock)
            self._api.may_write = self._elector.may_write
        self._replica = ReplicaContext(
            options, self._settings, self._observer, self._api, clock, self.nodes, certificate
        )

    async def start(self) -> None:
        """Start to wait for the lease."""
        self._task = asyncio.create_task(self._lead_repeatedly(self._replica))
        self._task.add_done_callback(self._on_task_done)

    async def stop(self) -> None:
        """Wait for running reconciles, release the lease, and stop."""
        if self.term is not None:
            await self.term.finish()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._elector is not None:
            await self._elector.release()
        await self._api.close()
        self.ended.set()

    @property
    def leads(self) -> bool:
        """Return whether this replica has the lease, complete caches and an endpoint."""
        return self.term is not None and self.term.active

    def is_alive(self) -> bool:
        """Return the result of the liveness probe."""
        return not self.failed and (self.term is None or self.term.is_alive(asyncio.get_running_loop().time()))

    def is_ready(self) -> bool:
        """Return the result of the readiness probe. A replica that waits for the lease is ready to take over."""
        return not self.failed and (self.term is None or self.term.is_fresh(asyncio.get_running_loop().time()))

    async def _lead_repeatedly(self, replica: ReplicaContext) -> None:
        """Run a term of leadership each time this replica gets the lease."""
        while True:
            if self._elector is not None:
                await self._elector.acquire()
            self.term = LeaderTerm(replica)
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

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if problem := find_setup_error(error):
            log.critical("%s", problem)
        else:
            log.critical("unexpected error; the operator stops", exc_info=error)
        self.failed, self.setup_failed = True, problem is not None
        self.ended.set()


def _load_certificate(options: CoordinatorOptions | None) -> ServerCertificate | None:
    if options is None or options.certificate is None or options.key is None:
        return None
    if options.authority is not None:
        read_authority(options.authority)
    try:
        return ServerCertificate(options.certificate, options.key)
    except (OSError, ssl.SSLError) as error:
        raise SetupError(f"cannot load the coordinator's certificate {options.certificate}: {error}") from error


def find_setup_error(error: BaseException | None) -> SetupError | None:
    """Return the SetupError that ended a group of tasks, if there is one."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(find_setup_error, error.exceptions)), None)
    return error if isinstance(error, SetupError) else None
