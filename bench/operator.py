"""Benchmark of the operator at scale, compared with a bare loop that creates the same pods on the same control plane.

    python -m bench.operator [--jobs 1000] [--nodes-per-job 4]

Measured: pods created per second; resident memory; API requests and CPU time per job; writes while nothing changes;
and the time until one deleted pod of every job is replaced, a second time while another process keeps one core busy.
It is compared with a bare loop, too, which deletes the pod, writes one status, and creates the replacement. A further
loop creates the same objects as the operator, without its decisions.
During the replacement, supervisors of all pods send heartbeats over TLS, as on real nodes (kwok's pods run no
supervisor), so that each job recovers in place: its other pods stay, and their supervisors receive the new world.
`extra_attempts` counts attempts that no deleted pod explains, e.g. because a pod counted as lost that still ran.

Requests and CPU time per job hardly depend on what else the machine does; rates and times do. All processes of the
control plane share the machine, so their CPU time is printed, too. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from bench.bare_loops import NUM_NODES, Limits, all_pods_run, bare_loops, delete_all, delete_pod
from bench.process_meter import CpuTimes, ProcessMeter, describe_cpu
from bench.scale import (
    LIMIT_SECONDS,
    OperatorBench,
    count_requests,
    create_parser,
    job_name,
    job_number,
    run_bench,
)
from bench.supervisor_pool import SupervisorPool
from finetune_operator.api import labels
from finetune_operator.cluster.kube.client.client import PARTIAL, Json
from finetune_operator.cluster.kube.client.objects import JOBS, PODS, SERVICES
from testing.controlplane.server import COMPONENTS
from testing.operator.harness import OperatorProcess, running
from testing.operator.heartbeats import tls_context

PODS_PER_NODE = 40
"""More nodes are added if there are more pods: a pod that does not fit would never run."""
JOBS_NAMESPACE = "jobs"
CONNECT_SECONDS = 15.0
"""Period over which the supervisors' first heartbeats are spread, like the starts of their pods."""
SETTLE_SECONDS = 8.0
"""Longer than the delay of progress writes."""


def running_jobs(operator: OperatorProcess) -> float:
    """Return the number of running jobs according to the operator's metrics."""
    found = operator.metrics()
    return sum(value for key, value in found.items() if key.startswith("finetune_jobs{") and 'phase="Running"' in key)


async def all_run(bench: OperatorBench, operator: OperatorProcess) -> bool:
    """Return whether all jobs run. A scrape costs the operator some milliseconds."""
    return running_jobs(operator) == bench.num_jobs


async def quiet(operator: OperatorProcess) -> bool:
    """Return whether the operator sends no requests for a while, so that all events have been sent."""
    before = count_requests(operator)
    await asyncio.sleep(SETTLE_SECONDS)
    return count_requests(operator) == before


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy with another process."""
    # It ends with its parent, even if that is killed.
    spin = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as process:
        try:
            yield
        finally:
            process.kill()


async def measure(bench: OperatorBench, operator: OperatorProcess, idle_seconds: float) -> dict[str, object]:
    """Run all measurements."""
    limits = await bare_loops(bench)
    await bench.create_jobs(JOBS_NAMESPACE)
    with running(operator):
        meter = ProcessMeter(bench.control_plane.programs, operator)
        before = meter.cpu_seconds()
        # The cost of its start counts, too.
        before["operator"] = 0.0
        # The operator has just become the leader: no pod existed before this moment.
        rate = await creation(bench, operator, limits, meter, before)
        supervisors = SupervisorPool(bench, operator.coordinator_port, tls_context(bench.control_plane))
        await supervisors.start(await bench.pods(), CONNECT_SECONDS)
        bench.print_status(f"{bench.total_pods} supervisors start to send heartbeats")
        await bench.wait("all jobs run", lambda: all_run(bench, operator))
        requests = report_requests(bench, operator, "API requests per job")
        cpu_ms = meter.cpu_ms_since(before, bench.num_jobs)
        bench.add_row("CPU time per job", f"{cpu_ms['operator']:.1f} ms; memory {meter.rss_mib:.0f} MiB")
        bench.add_row("CPU time per job, all processes", describe_cpu(cpu_ms))
        # The operator creates services for pods that the bench has left without a supervisor for a minute.
        for namespace in bench.namespaces_of(JOBS_NAMESPACE):
            await delete_all(bench, SERVICES.path(namespace))
        await bench.wait("events are sent", lambda: quiet(operator))
        idle = await idle_writes(operator, idle_seconds)
        bench.add_row("writes while idle", f"{idle:.0f} per minute, with heartbeats of all pods")
        recovery = Recovery(bench, operator, supervisors, meter)
        recover_seconds, recover_cpu_ms = await recovery.run(attempt=1)
        with busy_core():
            recover_seconds_busy, _ = await recovery.run(attempt=2)
        extra = await extra_attempts(bench, 3)
        bench.add_row("attempts without a deleted pod", f"{extra}; memory at the end {meter.rss_mib:.0f} MiB")
        supervisors.stop()
    return {
        "jobs": bench.num_jobs,
        "pods": bench.total_pods,
        "create_rate_ratio": round(rate / limits.rate, 3),
        "create_rate_ratio_same_objects": _ratio(rate, limits.rate_of_same_objects),
        "recover_seconds": round(recover_seconds, 1),
        "recover_seconds_bare": round(limits.recover_seconds, 1),
        "recover_seconds_busy": round(recover_seconds_busy, 1),
        "extra_attempts": extra,
        "rss_mib": round(meter.rss_mib),
        "requests_per_job": round(sum(requests.values()) / bench.num_jobs, 1),
        "cpu_ms_per_job": round(cpu_ms["operator"], 1),
        "recover_cpu_ms_per_job": round(recover_cpu_ms["operator"], 1),
        "total_cpu_ms_per_job": round(sum(cpu_ms.values()), 1),
        "recover_total_cpu_ms_per_job": round(sum(recover_cpu_ms.values()), 1),
        "idle_writes_per_minute": round(idle, 1),
    }


def _ratio(value: float, limit: float | None) -> float | None:
    return None if limit is None else round(value / limit, 3)


async def creation(
    bench: OperatorBench, operator: OperatorProcess, limits: Limits, meter: ProcessMeter, cpu_seconds: CpuTimes
) -> float:
    """Wait until the pods of all jobs exist and run; return the created pods per second.

    cpu_seconds: CPU time of the processes at the start.
    """
    started, began_at = time.monotonic(), datetime.now(UTC)
    await bench.wait("all pods are created", lambda: bench.has_pods(bench.total_pods))
    cpu_ms = meter.cpu_ms_since(cpu_seconds, bench.num_jobs)
    # The API server cuts the fraction of a second off.
    last = await bench.newest_pod() + timedelta(seconds=1)
    rate = bench.total_pods / (last - began_at).total_seconds()
    parts = [f"{rate:.0f} pods/s, {100 * rate / limits.rate:.0f} % of the bare loop"]
    if limits.rate_of_same_objects is not None:
        parts.append(f"{100 * rate / limits.rate_of_same_objects:.0f} % of the one with the same objects")
    bench.add_row("operator", ", ".join(parts))
    bench.add_row("CPU time per job until then, all processes", describe_cpu(cpu_ms))
    report_requests(bench, operator, "API requests per job until then")
    ran = await all_pods_run(bench)
    bench.add_row("all pods run after", f"{ran - started:.1f} s")
    return rate


def report_requests(bench: OperatorBench, operator: OperatorProcess, what: str) -> dict[str, float]:
    """Return the requests so far, and print them per job."""
    counts = count_requests(operator)
    bench.add_row(what, f"{sum(counts.values()) / bench.num_jobs:.1f}")
    for key, value in sorted(counts.items()):
        print(f"  {value / bench.num_jobs:6.2f} {key}")
    return counts


async def extra_attempts(bench: OperatorBench, expected: int) -> int:
    """Return the number of attempts of all jobs above the expected number of each."""
    jobs = (await bench.get(JOBS.path(), {}))["items"]
    return sum(job["status"]["attempt"] - expected for job in jobs)


async def idle_writes(operator: OperatorProcess, seconds: float) -> float:
    """Return the writes per minute while nothing changes, without those of the lease."""
    before = sum(count_requests(operator, writes_only=True).values())
    await asyncio.sleep(seconds)
    return (sum(count_requests(operator, writes_only=True).values()) - before) * 60 / seconds


@dataclass
class Recovery:
    """Deletes one pod of every job, and waits until all jobs train again."""

    bench: OperatorBench
    operator: OperatorProcess
    supervisors: SupervisorPool
    meter: ProcessMeter
    deleted_at: dict[str, float] = field(default_factory=dict)
    """When the pod of each job was deleted."""

    async def run(self, attempt: int) -> tuple[float, CpuTimes]:
        """End an attempt of all jobs; return the seconds until all pods are replaced, and CPU time per job in ms."""
        bench = self.bench
        before = {pod["metadata"]["name"] for pod in await bench.pods()}
        requests = sum(count_requests(self.operator).values())
        started, cpu_seconds = time.monotonic(), self.meter.cpu_seconds()
        names = (job_name(number) for number in range(bench.num_jobs))
        deleting = asyncio.create_task(bench.run_all(self._lose(job, attempt) for job in names))
        deleting.add_done_callback(lambda _: bench.print_status(f"{bench.num_jobs} pods are deleted"))
        async with _Replacements(self, attempt).watched() as replacements:
            await bench.wait("all pods are replaced", replacements.all_exist)
            await deleting
            half, most, seconds = (replacements.seconds_until(share, started) for share in (0.5, 0.95, 1.0))
            what = (
                f"after {seconds:.1f} s ({bench.num_jobs / seconds:.0f} jobs/s); half {half:.1f} s, 95 % {most:.1f} s"
            )
            bench.add_row("one pod of every job replaced", what)
            bench.add_row("each after its pod was deleted", replacements.describe_delays(self.deleted_at))
            cpu_ms = self.meter.cpu_ms_since(cpu_seconds, bench.num_jobs)
            bench.add_row("CPU time per job until then, all processes", describe_cpu(cpu_ms))
            ran = await bench.wait("all jobs run again", lambda: all_run(bench, self.operator))
        kept = before & {pod["metadata"]["name"] for pod in await bench.pods()}
        cpu_ms = self.meter.cpu_ms_since(cpu_seconds, bench.num_jobs)
        own, requests = cpu_ms["operator"], (sum(count_requests(self.operator).values()) - requests) / bench.num_jobs
        what = f"after {ran - started:.1f} s; {len(kept)} pods were kept"
        bench.add_row("all jobs train again", f"{what}; {requests:.1f} requests and {own:.1f} ms of CPU time per job")
        bench.add_row("CPU time per job, all processes", describe_cpu(cpu_ms))
        return seconds, cpu_ms

    async def _lose(self, job: str, attempt: int) -> None:
        pod = f"{job}-a{attempt}-n{self.bench.num_pods - 1}"
        await delete_pod(self.bench, self.bench.namespace_of(JOBS_NAMESPACE, job_number(job)), pod)
        self.deleted_at[job] = time.monotonic()
        self.supervisors.lose(job, pod)


def _quantile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that is at least as large as this share of all."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class _Replacements:
    """The pods that are created after an attempt; the supervisor of each is started as soon as its pod runs.

    They are watched, not listed: a list of thousands of pods every second takes the time that it should measure.
    """

    def __init__(self, recovery: Recovery, attempt: int) -> None:
        self._recovery = recovery
        self._selector = f"{labels.ATTEMPT} notin ({','.join(map(str, range(1, attempt + 1)))})"
        self._created_at: dict[str, float] = {}

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[_Replacements]:
        """Watch while the context is open."""
        async with asyncio.TaskGroup() as tasks:
            watching = [tasks.create_task(self._watch_created()), tasks.create_task(self._watch_running(tasks))]
            try:
                yield self
            finally:
                for task in watching:
                    task.cancel()

    async def all_exist(self) -> bool:
        """Return whether every job has a replacement."""
        return len(self._created_at) >= self._recovery.bench.num_jobs

    def seconds_until(self, share: float, started: float) -> float:
        """Return the seconds from the start until a share of all replacements existed."""
        return _quantile(self._created_at.values(), share) - started

    def describe_delays(self, deleted_at: dict[str, float]) -> str:
        """Return how long jobs wait for a replacement after their own pod was deleted."""
        created = {pod.rpartition("-a")[0]: at for pod, at in self._created_at.items()}
        delays = [created[job] - at for job, at in deleted_at.items()]
        half, most, longest = (_quantile(delays, share) for share in (0.5, 0.95, 1.0))
        return f"p50 {half:.1f} s, p95 {most:.1f} s, max {longest:.1f} s"

    async def _watch_created(self) -> None:
        async with aclosing(self._added({})) as pods:
            async for pod in pods:
                self._created_at.setdefault(pod["metadata"]["name"], time.monotonic())

    async def _watch_running(self, tasks: asyncio.TaskGroup) -> None:
        started: set[str] = set()
        async with aclosing(self._added({"fieldSelector": "status.phase=Running"})) as pods:
            async for pod in pods:
                if pod["metadata"]["name"] not in started:
                    started.add(pod["metadata"]["name"])
                    tasks.create_task(self._recovery.supervisors.start([pod], 0.0))

    async def _added(self, query: dict[str, str]) -> AsyncGenerator[Json, None]:
        """Yield the metadata of each pod that appears among those that a query selects."""
        bench = self._recovery.bench
        query = {**query, "labelSelector": self._selector, "timeoutSeconds": f"{LIMIT_SECONDS:.0f}"}
        async with aclosing(bench.api.watch(PODS.path(), query, PARTIAL)) as events:
            async for event in events:
                if event["type"] == "ADDED":
                    yield event["object"]


async def main() -> None:
    """Parse the command line and run the benchmark."""
    command_line = create_parser("bench.operator", __doc__)
    command_line.add_argument("--idle-seconds", type=float, default=60.0, help="time without any change (default: 60)")
    options = command_line.parse_args()

    async def measured(bench: OperatorBench, operator: OperatorProcess) -> dict[str, object]:
        bench.control_plane.add_nodes(max(NUM_NODES, bench.total_pods // PODS_PER_NODE))
        return await measure(bench, operator, options.idle_seconds)

    await run_bench(options, COMPONENTS, measured)


if __name__ == "__main__":
    asyncio.run(main())
