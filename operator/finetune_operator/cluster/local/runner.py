"""Drives one job on this machine from here to its end: cluster, coordinator and core together.

Used by `finetune run` and by tests. It prints nothing: what it sees goes to `Audience`.
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
from finetune_operator.cluster.local.endpoint import free_port
from finetune_operator.cluster.local.faults import Fault, FaultKind
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.jobs import key_of
from finetune_operator.cluster.local.kubelet.container import LOOPBACK
from finetune_operator.cluster.local.settings import LOCAL
from finetune_operator.cluster.local.tasks import Tasks
from finetune_operator.cluster.protocol import Clock
from finetune_operator.cluster.reconcile import Pass, drive, reconcile
from finetune_operator.coordinator.server import Coordinator
from finetune_operator.plan.model.types import PodPhase
from finetune_operator.plan.model.view import members_of
from finetune_operator.settings import Settings

RETRY = timedelta(seconds=5)
FAULT_BEAT_SECONDS = 0.05
"""While a fault waits for its step, supervisors are asked to say every one."""
NOTICE = "Pod was terminated in response to imminent node shutdown."
ENDED = frozenset({PodPhase.SUCCEEDED, PodPhase.FAILED})


class Audience(Protocol):
    """Who is told what happens."""

    def see(self, seen: Pass) -> None:
        """A pass was made."""
        ...

    def warn(self, sentence: str) -> None:
        """Something is odd, but goes on."""
        ...


class LocalRun:
    """One `finetune run`. The caller holds the job's lock."""

    def __init__(
        self, home: Home, job: FineTuneJob, audience: Audience, now: Clock, settings: Settings = LOCAL
    ) -> None:
        self._home = home
        self._job = job
        self._audience = audience
        self._now = now
        self._settings = settings
        self._faults: tuple[Fault, ...] = ()
        self._num_interrupts = 0
        self._cluster: LocalCluster | None = None
        self._tasks: Tasks | None = None

    def plan_faults(self, faults: Sequence[Fault]) -> None:
        """Faults to come; those whose step the job has already passed are left out, with a warning."""
        step = self._job.status.step or 0
        for fault in faults:
            if fault.at_step is not None and 0 < fault.at_step <= step:
                self._audience.warn(f"{fault} is left out: the job is at step {step}")
            else:
                self._faults = (*self._faults, fault)

    def interrupt(self) -> None:
        """Stop the job with a checkpoint; the second time, without."""
        self._num_interrupts += 1
        if self._cluster is not None and self._tasks is not None:
            self._tasks.spawn(self._stop(self._cluster, kill=self._num_interrupts > 1))

    @property
    def cluster(self) -> LocalCluster | None:
        """The cluster that it runs on; None before and after. Benches look at its pods."""
        return self._cluster

    @property
    def interrupted(self) -> bool:
        """Whether it was asked to stop."""
        return self._num_interrupts > 0

    async def run(self) -> Pass:
        """Drive the job until it is finished, or suspended after an interrupt; return the last pass."""
        async with Tasks() as tasks:
            cluster = LocalCluster(self._home, self._job, self._now, tasks, self._audience.warn)
            coordinator = Coordinator(
                cluster.book, cluster.whose_token, self._answer, lambda *_: cluster.wake.set(), self._now
            )
            self._cluster, self._tasks = cluster, tasks
            try:
                await cluster.suspend(self.interrupted)
                settings = await self._start(cluster, coordinator)
                passes = drive(partial(self._pass, cluster, settings), cluster.wake)
                return await self._follow(cluster, passes)
            finally:
                self._cluster = self._tasks = None
                cluster.kubelet.close()
                await coordinator.stop()

    async def _start(self, cluster: LocalCluster, coordinator: Coordinator) -> Settings:
        """Listen where living pods expect it, take these over, and say how new pods reach the coordinator."""
        known = cluster.endpoint.coordinator_port
        try:
            port = await coordinator.start(LOOPBACK, known or free_port())
        except OSError:
            port = await coordinator.start(LOOPBACK, free_port())
        await asyncio.to_thread(cluster.endpoint.keep_coordinator_port, port)
        await cluster.kubelet.start()
        if port != known:
            for pod in cluster.kubelet.pods:
                if pod.processes is not None:
                    await cluster.kubelet.preempt(
                        pod.name, Reason.PREEMPTED, "The coordinator had to take another port."
                    )
        return replace(self._settings, coordinator_url=f"http://{LOOPBACK}:{port}")

    async def _pass(self, cluster: LocalCluster, settings: Settings) -> Pass:
        """One pass; a disk that is full now may have room later, and meanwhile the pods go on."""
        try:
            return await reconcile(cluster, key_of(self._job), settings, self._now)
        except OSError as error:
            self._audience.warn(f"the state cannot be written ({error}); trying again in {RETRY.seconds} s")
            return Pass(cluster.job, await cluster.observe(cluster.job or self._job), look_again=RETRY)

    async def _follow(self, cluster: LocalCluster, passes: AsyncGenerator[Pass, None]) -> Pass:
        async with aclosing(passes):
            async for seen in passes:
                self._audience.see(seen)
                if self._is_over(seen):
                    for fault in self._faults:
                        self._audience.warn(f"{fault} did not come about: the job was over first")
                    return seen
                await self._cause_faults(cluster, seen)
        raise AssertionError("passes never end")

    def _is_over(self, seen: Pass) -> bool:
        if seen.job is None:
            return True
        pods = seen.observed.pods
        if seen.job.status.phase in FINISHED:
            return all(pod.phase in ENDED for pod in pods)
        return self.interrupted and seen.job.status.phase is Phase.SUSPENDED and not pods

    async def _cause_faults(self, cluster: LocalCluster, seen: Pass) -> None:
        assert seen.job is not None
        attempt = seen.job.status.attempt
        beats = [received.beat for received in seen.observed.beats.values() if received.beat.attempt == attempt]
        reports = [report for beat in beats for report in beat.ranks]
        for fault in self._faults:
            if fault.kind is FaultKind.ROOM:
                if fault.is_due(reports):
                    self._faults = tuple(other for other in self._faults if other is not fault)
                    await cluster.kubelet.set_room(fault.rank, Reason.TERMINATION_BY_KUBELET, NOTICE)
                continue
            node_rank = fault.rank // seen.job.spec.topology.processes_per_node
            members = members_of(seen.job.status, seen.job.spec)
            if node_rank >= len(members):
                continue
            name = pod_name(seen.job.metadata.name, *members[node_rank])
            if not fault.is_due(reports) or cluster.kubelet.get(name) is None:
                continue
            self._faults = tuple(other for other in self._faults if other is not fault)
            if fault.kind is FaultKind.PREEMPT:
                await cluster.kubelet.preempt(name, Reason.TERMINATION_BY_KUBELET, NOTICE)
            else:
                await cluster.kubelet.vanish(name)

    def _answer(self, beat: Heartbeat) -> Reply:
        assert self._cluster is not None
        reply = self._cluster.answer(beat)
        return reply.model_copy(update={"beat_seconds": FAULT_BEAT_SECONDS}) if self._faults else reply

    async def _stop(self, cluster: LocalCluster, *, kill: bool) -> None:
        await cluster.suspend(True)
        if kill:
            for pod in cluster.kubelet.pods:
                await cluster.kubelet.vanish(pod.name)
