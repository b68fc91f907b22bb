"""Benchmark of the operator at scale, compared with a bare loop that creates the same pods on the same control plane.

    python -m bench.operator [--jobs 1000] [--nodes-per-job 4]

Measured: pods created per second; resident memory; API requests per job; writes while nothing changes; and the time
until one deleted pod of every job is replaced. During the replacement, supervisors of all pods send heartbeats over
TLS, as on real nodes (kwok's pods run no supervisor), so that each job recovers in place: its other pods stay, and
their supervisors receive the new world. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterable

import psutil

from bench.scale import OperatorBench, count_requests, create_parser, create_supervisors, job_name, run_bench
from bench.supervisors import BenchSupervisor, HeartbeatCounts
from finetune_operator.api import labels
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.kube.client.client import Json
from finetune_operator.cluster.kube.client.objects import PODS
from finetune_operator.manifests import build_pod
from finetune_operator.settings import Settings
from testing.controlplane.server import COMPONENTS
from testing.operator.harness import OperatorProcess, build_job, running
from testing.operator.heartbeats import tls_context

NUM_NODES = 100
CONNECT_SECONDS = 15.0
"""Period over which the supervisors' first heartbeats are spread, like the starts of their pods."""
SETTLE_SECONDS = 8.0
"""Longer than the delay of progress writes."""


async def warm_up(bench: OperatorBench) -> None:
    """Run a pod on every node, so that scheduler and kwok are active in all measurements, as in a real cluster.

    If the scheduler became active late, the bare loop would have the API server for itself.
    """
    namespace = bench.control_plane.create_namespace("warm")
    job, settings = manifest(namespace, 0, NUM_NODES), Settings()
    await bench.run_all(
        bench.api.create(PODS.path(namespace), unowned(build_pod(job, 1, rank, settings))) for rank in range(NUM_NODES)
    )
    await all_pods_run(bench, namespace)
    await clear(bench, namespace)


async def bare_loop(bench: OperatorBench) -> float:
    """Return the pods per second of a loop that does nothing else."""
    await warm_up(bench)
    namespace = bench.control_plane.create_namespace("bare")
    jobs = [manifest(namespace, number, bench.num_pods) for number in range(bench.num_jobs)]
    settings = Settings()
    pods = (build_pod(job, 1, rank, settings) for job in jobs for rank in range(bench.num_pods))
    started = time.monotonic()
    await bench.run_all(bench.api.create(PODS.path(namespace), unowned(pod)) for pod in pods)
    seconds = time.monotonic() - started
    bench.print_status(f"the bare loop created {bench.total_pods} pods in {seconds:.1f} s; deleting them")
    await all_pods_run(bench, namespace)
    await clear(bench, namespace)
    return bench.total_pods / seconds


async def all_pods_run(bench: OperatorBench, namespace: str) -> float:
    """Wait until no pod is pending; return the time."""

    async def none_pending() -> bool:
        page = await bench.api.get(PODS.path(namespace), {"fieldSelector": "status.phase=Pending", "limit": "1"})
        return not page.get("items")

    return await bench.wait("pods run", none_pending)


async def clear(bench: OperatorBench, namespace: str) -> None:
    """Delete all pods of a namespace and wait until none is left."""
    query = {"gracePeriodSeconds": "0"}
    await bench.api.request("DELETE", PODS.path(namespace), query=query, seconds=300)
    await bench.wait("pods are deleted", lambda: bench.has_pods(namespace, 0))


async def delete_pod(bench: OperatorBench, namespace: str, pod: str) -> None:
    """Delete a pod without a grace period, as if its node had been lost."""
    await bench.api.delete(PODS.path(namespace, pod), {"gracePeriodSeconds": 0})


def manifest(namespace: str, number: int, num_pods: int) -> FineTuneJob:
    """Return a job as the API server stores it."""
    job = build_job(job_name(number), nodes=num_pods)
    job["metadata"] |= {"namespace": namespace, "uid": f"{number:08}-0000-0000-0000-000000000000"}
    return FineTuneJob.model_validate(job)


def unowned(pod: Json) -> Json:
    """Return a pod without its owner, which does not exist."""
    meta = {key: value for key, value in pod["metadata"].items() if key != "ownerReferences"}
    return {**pod, "metadata": meta}


def running_jobs(operator: OperatorProcess) -> float:
    """Return the number of running jobs according to the operator's metrics."""
    found = operator.metrics()
    return sum(value for key, value in found.items() if key.startswith("finetune_jobs{") and 'phase="Running"' in key)


async def all_run(bench: OperatorBench, operator: OperatorProcess) -> bool:
    """Return whether all jobs run. Checks once per second, because a scrape costs the operator some milliseconds."""
    await asyncio.sleep(1.0)
    return running_jobs(operator) == bench.num_jobs


async def quiet(operator: OperatorProcess) -> bool:
    """Return whether the operator sends no requests for a while, so that all events have been sent."""
    before = count_requests(operator)
    await asyncio.sleep(SETTLE_SECONDS)
    return count_requests(operator) == before


class SupervisorPool:
    """The supervisors of all pods of all jobs."""

    def __init__(self, bench: OperatorBench, port: int, context: ssl.SSLContext) -> None:
        self._bench = bench
        self._port = port
        self._context = context
        self._counts = HeartbeatCounts()
        self._jobs: dict[str, list[BenchSupervisor]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def join(self, pods: Iterable[Json], spread_seconds: float) -> None:
        """Start the supervisors of pods."""
        for supervisor in await create_supervisors(self._bench, pods, self._counts):
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


async def measure(bench: OperatorBench, operator: OperatorProcess, idle_seconds: float) -> dict[str, object]:
    """Run all measurements."""
    bare = await bare_loop(bench)
    bench.add_row("bare loop", f"{bare:.0f} pods/s")
    namespace = bench.control_plane.create_namespace("jobs")
    await bench.create_jobs(namespace)
    with running(operator):
        assert operator.process is not None
        process = psutil.Process(operator.process.pid)
        # The operator has just become the leader: no pod existed before this moment.
        started = time.monotonic()
        created = await bench.wait("all pods are created", lambda: bench.has_pods(namespace, bench.total_pods))
        rate = bench.total_pods / (created - started)
        bench.add_row("operator", f"{rate:.0f} pods/s, {100 * rate / bare:.0f} % of the bare loop")
        ran = await all_pods_run(bench, namespace)
        bench.add_row("all pods run after", f"{ran - started:.1f} s")

        supervisors = SupervisorPool(bench, operator.coordinator_port, tls_context(bench.control_plane))
        await supervisors.join(await bench.pods(namespace), CONNECT_SECONDS)
        bench.print_status(f"{bench.total_pods} supervisors start to send heartbeats")
        await bench.wait("all jobs run", lambda: all_run(bench, operator))
        counts = count_requests(operator)
        per_job = sum(counts.values()) / bench.num_jobs
        bench.add_row("API requests per job", f"{per_job:.1f}")
        for key, value in sorted(counts.items()):
            print(f"  {value / bench.num_jobs:6.2f} {key}")
        rss = process.memory_info().rss / 2**20
        cpu = process.cpu_times()
        bench.add_row("memory", f"{rss:.0f} MiB, {cpu.user + cpu.system:.1f} CPU seconds")
        await bench.wait("events are sent", lambda: quiet(operator))
        idle = await idle_writes(operator, idle_seconds)
        bench.add_row("writes while idle", f"{idle:.0f} per minute, with heartbeats of all pods")
        recover = await recovery(bench, operator, supervisors, namespace)
        rss = max(rss, process.memory_info().rss / 2**20)
        bench.add_row("memory at the end", f"{rss:.0f} MiB")
        supervisors.stop()
    return {
        "jobs": bench.num_jobs,
        "pods": bench.total_pods,
        "create_rate_ratio": round(rate / bare, 3),
        "recover_seconds": round(recover, 1),
        "rss_mib": round(rss),
        "requests_per_job": round(per_job, 1),
        "idle_writes_per_minute": round(idle, 1),
    }


async def idle_writes(operator: OperatorProcess, seconds: float) -> float:
    """Return the writes per minute while nothing changes, without those of the lease."""
    before = sum(count_requests(operator, writes_only=True).values())
    await asyncio.sleep(seconds)
    return (sum(count_requests(operator, writes_only=True).values()) - before) * 60 / seconds


async def recovery(
    bench: OperatorBench, operator: OperatorProcess, supervisors: SupervisorPool, namespace: str
) -> float:
    """Delete one pod of every job; return the seconds until all of them are replaced."""
    rank = bench.num_pods - 1
    before = {pod["metadata"]["name"] for pod in await bench.pods(namespace)}
    started = time.monotonic()

    async def lose(job: str) -> None:
        pod = f"{job}-a1-n{rank}"
        await delete_pod(bench, namespace, pod)
        supervisors.lose(job, pod)

    async def all_replaced() -> bool:
        await asyncio.sleep(1.0)
        pods = await bench.pods(namespace, f"{labels.ATTEMPT}!=1")
        fresh = [pod for pod in pods if pod["metadata"]["name"] not in joined]
        joined.update(pod["metadata"]["name"] for pod in fresh)
        await supervisors.join(fresh, 0.0)
        return len(joined) >= bench.num_jobs

    joined: set[str] = set()
    deleting = asyncio.create_task(bench.run_all(lose(job_name(number)) for number in range(bench.num_jobs)))
    deleting.add_done_callback(lambda _: bench.print_status(f"{bench.num_jobs} pods are deleted"))
    replaced = await bench.wait("all pods are replaced", all_replaced)
    await deleting
    seconds = replaced - started
    ran = await bench.wait("all jobs run again", lambda: all_run(bench, operator))
    kept = before & {pod["metadata"]["name"] for pod in await bench.pods(namespace)}
    bench.add_row("one pod of every job replaced", f"after {seconds:.1f} s ({bench.num_jobs / seconds:.0f} jobs/s)")
    bench.add_row("all jobs train again", f"after {ran - started:.1f} s; {len(kept)} pods were kept")
    return seconds


async def main() -> None:
    """Parse the command line and run the benchmark."""
    command_line = create_parser("bench.operator", __doc__)
    command_line.add_argument("--idle-seconds", type=float, default=60.0, help="time without any change (default: 60)")
    options = command_line.parse_args()

    async def measured(bench: OperatorBench, operator: OperatorProcess) -> dict[str, object]:
        bench.control_plane.add_nodes(NUM_NODES)
        return await measure(bench, operator, options.idle_seconds)

    await run_bench(options, COMPONENTS, measured)


if __name__ == "__main__":
    asyncio.run(main())
