"""The supervisors of all pods of all jobs: which of them form a gang, and what a lost pod means for the others."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable

from bench.scale import OperatorBench, create_supervisors
from bench.supervisors import BenchSupervisor, HeartbeatCounts
from finetune_operator.cluster.kube.client.client import Json


class SupervisorPool:
    """Supervisors by job. The ranks of a job train only when those of all its pods have joined, as real ones do."""

    def __init__(self, bench: OperatorBench, port: int, context: ssl.SSLContext) -> None:
        self._bench = bench
        self._port = port
        self._context = context
        self._counts = HeartbeatCounts()
        self._jobs: dict[str, list[BenchSupervisor]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, pods: Iterable[Json], spread_seconds: float) -> None:
        """Start the supervisors of pods."""
        for supervisor in await create_supervisors(self._bench, pods, self._counts):
            supervisor.joined = self._joined
            # The manifest of rank 0 contains its own address.
            supervisor.is_joining = supervisor.node_rank > 0
            self._jobs.setdefault(supervisor.job, []).append(supervisor)
            run = supervisor.run(self._port, self._context, spread_seconds)
            self._tasks[supervisor.pod] = asyncio.create_task(run)

    def lose(self, job: str, pod: str) -> None:
        """Stop a pod's supervisor; the others of its gang detect the loss in their next step."""
        self._tasks.pop(pod).cancel()
        self._jobs[job] = [supervisor for supervisor in self._jobs[job] if supervisor.pod != pod]
        for supervisor in self._jobs[job]:
            supervisor.lose_peer()

    def stop(self) -> None:
        """Stop all supervisors."""
        for task in self._tasks.values():
            task.cancel()

    def _joined(self, supervisor: BenchSupervisor) -> None:
        gang = self._jobs[supervisor.job]
        if len(gang) == self._bench.num_pods and all(member.has_joined for member in gang):
            for member in gang:
                member.train()
