"""Runs one job on this machine until it finishes: connects cluster, coordinator and core.

Used by `finetune run` and by tests. It prints nothing, but reports to a `RunObserver`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Protocol

from finetune_contract.heartbeat import Heartbeat, Reply
from finetune_contract.phase import FINISHED, Phase
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import pod_name
from finetune_operator.api.reasons import Reason
from finetune_operator.cluster.local.cluster import LocalCluster
from finetune_operator.cluster.local.faults import FaultKind, PlannedFault
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.jobs import key_of
from finetune_operator.cluster.local.kubelet.container import LOOPBACK
from finetune_operator.cluster.local.ports import find_free_port
from finetune_operator.cluster.local.settings import LOCAL
from finetune_operator.cluster.local.task_scope import TaskScope
from finetune_operator.cluster.protocol import Clock
from finetune_operator.cluster.reconcile import ReconcileResult, reconcile, reconcile_forever
from finetune_operator.coordinator.server import Coordinator
from finetune_operator.plan.model.types import PodPhase
from finetune_operator.plan.model.view import members_of
from finetune_operator.settings import Settings

RETRY = timedelta(seconds=5)
FAULT_BEAT_SECONDS = 0.05
"""Heartbeat interval while a fault is pending, so that every step is reported."""
SHUTDOWN_MESSAGE = "Pod was terminated in response to imminent node shutdown."
ENDED = frozenset({PodPhase.SUCCEEDED, PodPhase.FAILED})


class RunObserver(Protocol):
    """Receives the progress of a run."""

    def on_reconcile(self, result: ReconcileResult) -> None:
        """Handle the result of a reconcile."""
        ...

    def warn(self, message: str) -> None:
        """Handle a warning. The run continues."""
        ...


class LocalRun:
    """One `finetune run`. The caller holds the job's lock."""

    def __init__(
        self, home: Home, job: FineTuneJob, observer: RunObserver, now: Clock, settings: Settings = LOCAL
    ) -> None:
        self._home = home
        self._job = job
        self._observer = observer
        self._now = now
        self._settings = settings
        self._faults: tuple[PlannedFault, ...] = ()
        self._num_interrupts = 0
        self._cluster: LocalCluster | None = None
        self._tasks: TaskScope | None = None

    def plan_faults(self, faults: Sequence[PlannedFault]) -> None:
        """Add faults to trigger. Skip those whose step the job has already passed, with a warning."""
        step = self._job.status.step or 0
        for fault in faults:
            if fault.at_step is not None and 0 < fault.at_step <= step:
                self._observer.warn(f"{fault} is skipped: the job is already at step {step}")
            else:
                self._faults = (*self._faults, fault)

    def interrupt(self) -> None:
        """Stop the job after a checkpoint. On the second call, kill its pods."""
        self._num_interrupts += 1
        if self._cluster is not None and self._tasks is not None:
            self._tasks.spawn(self._stop(self._cluster, kill=self._num_interrupts > 1))

    @property
    def cluster(self) -> LocalCluster | None:
        """The cluster that the job runs on; None before and after the run. Used by fault injection."""
        return self._cluster

    @property
    def interrupted(self) -> bool:
        """Return whether `interrupt` was called."""
        return self._num_interrupts > 0

    async def run(self) -> ReconcileResult:
        """Run the job until it is finished, or suspended after an interrupt. Return the last reconcile's result."""
        async with TaskScope() as tasks:
            cluster = LocalCluster(self._home, self._job, self._now, tasks, self._observer.warn)
            coordinator = Coordinator(
                cluster.heartbeats,
                cluster.authenticate_token,
                self._answer,
                lambda *_: cluster.wake.set(),
                self._now,
                changes=cluster.changes,
            )
            self._cluster, self._tasks = cluster, tasks
            try:
                await cluster.suspend(self.interrupted)
                settings = await self._start(cluster, coordinator)
                results = reconcile_forever(partial(self._reconcile, cluster, settings), cluster.wake)
                return await self._run_until_over(cluster, results)
            finally:
                cluster.kubelet.close()
                # Until then it answers heartbeats, also those whose replies it holds.
                await coordinator.stop()
                self._cluster = self._tasks = None

    async def _start(self, cluster: LocalCluster, coordinator: Coordinator) -> Settings:
        """Start the coordinator on the port that running pods use, adopt those pods, and return the settings.

        If another process has taken the port, preempt the running pods: they cannot reach the new one.
        """
        previous = cluster.ports.coordinator_port
        try:
            port = await coordinator.start(LOOPBACK, previous or find_free_port())
        except OSError:
            port = await coordinator.start(LOOPBACK, find_free_port())
        await asyncio.to_thread(cluster.ports.keep_coordinator_port, port)
        await cluster.kubelet.start()
        if port != previous:
            for pod in cluster.kubelet.pods:
                if pod.processes is not None:
                    await cluster.kubelet.preempt(pod.name, Reason.PREEMPTED, "The coordinator had to change its port.")
        return replace(self._settings, coordinator_url=f"http://{LOOPBACK}:{port}")

    async def _reconcile(self, cluster: LocalCluster, settings: Settings) -> ReconcileResult:
        """Reconcile once. On a full disk, retry later; the pods continue."""
        try:
            return await reconcile(cluster, key_of(self._job), settings, self._now)
        except OSError as error:
            self._observer.warn(f"the state cannot be written ({error}); retrying in {RETRY.seconds} s")
            return ReconcileResult(cluster.job, await cluster.observe(cluster.job or self._job), requeue_after=RETRY)

    async def _run_until_over(
        self, cluster: LocalCluster, results: AsyncGenerator[ReconcileResult, None]
    ) -> ReconcileResult:
        async with aclosing(results):
            async for result in results:
                self._observer.on_reconcile(result)
                if self._is_over(result):
                    for fault in self._faults:
                        self._observer.warn(f"{fault} was not triggered: the job ended first")
                    return result
                await self._trigger_faults(cluster, result)
        raise AssertionError("reconcile_forever returned")

    def _is_over(self, result: ReconcileResult) -> bool:
        if result.job is None:
            return True
        pods = result.observed.pods
        if result.job.status.phase in FINISHED:
            return all(pod.phase in ENDED for pod in pods)
        return self.interrupted and result.job.status.phase is Phase.SUSPENDED and not pods

    async def _trigger_faults(self, cluster: LocalCluster, result: ReconcileResult) -> None:
        assert result.job is not None
        job, status = result.job, result.job.status
        attempt = status.attempt
        beats = [received.beat for received in result.observed.beats.values() if received.beat.attempt == attempt]
        reports = [report for beat in beats for report in beat.ranks]
        for fault in self._faults:
            if fault.kind is FaultKind.ROOM:
                if fault.is_due(reports):
                    self._faults = tuple(other for other in self._faults if other is not fault)
                    await cluster.kubelet.set_capacity(fault.rank, Reason.TERMINATION_BY_KUBELET, SHUTDOWN_MESSAGE)
                continue
            node_rank = fault.rank // job.spec.topology.processes_per_node
            members = members_of(status, job.spec)
            if node_rank >= len(members):
                continue
            name = pod_name(job.metadata.name, *members[node_rank])
            if not fault.is_due(reports) or cluster.kubelet.get(name) is None:
                continue
            self._faults = tuple(other for other in self._faults if other is not fault)
            if fault.kind is FaultKind.PREEMPT:
                await cluster.kubelet.preempt(name, Reason.TERMINATION_BY_KUBELET, SHUTDOWN_MESSAGE)
            else:
                await cluster.kubelet.kill_pod(name)

    def _answer(self, beat: Heartbeat) -> Reply:
        assert self._cluster is not None
        reply = self._cluster.answer(beat)
        return reply.model_copy(update={"beat_seconds": FAULT_BEAT_SECONDS}) if self._faults else reply

    async def _stop(self, cluster: LocalCluster, *, kill: bool) -> None:
        await cluster.suspend(True)
        if kill:
            for pod in cluster.kubelet.pods:
                await cluster.kubelet.kill_pod(pod.name)
