"""The operator at scale, beside a bare loop that creates the same pods on the same control plane in the same run.

    python -m bench.operator [--jobs 1000] [--nodes-per-job 4]

Measured: pods created per second; resident memory; API requests per job; writes while nothing changes; and the time to
all replacements after one pod of every job was deleted. By then supervisors of all pods beat over TLS, as they would
on nodes (kwok's pods have none), so that each job recovers in place: its other pods stay, and their supervisors are
told of the new world. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterable

import psutil

from bench.scale import Bench, name, parser, requests, run, supervisors
from bench.supervisors import Supervisor, Tally
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
"""Over so long the supervisors' first beats are spread, as the starts of their pods would be."""
SETTLE_SECONDS = 8.0
"""Longer than progress waits to be written."""


async def warm_up(bench: Bench) -> None:
    """A pod on every node that runs: scheduler and nodes are at work in all that follows, as they are in a cluster.

    A scheduler that begins late would leave the API server to the bare loop alone.
    """
    namespace = bench.control_plane.create_namespace("warm")
    job, settings = manifest(namespace, 0, NUM_NODES), Settings()
    await bench.each(
        bench.api.create(PODS.path(namespace), unowned(build_pod(job, 1, rank, settings))) for rank in range(NUM_NODES)
    )
    await all_pods_run(bench, namespace)
    await clear(bench, namespace)


async def bare_loop(bench: Bench) -> float:
    """Pods per second of a loop that does nothing else."""
    await warm_up(bench)
    namespace = bench.control_plane.create_namespace("bare")
    jobs = [manifest(namespace, number, bench.num_pods) for number in range(bench.num_jobs)]
    settings = Settings()
    pods = (build_pod(job, 1, rank, settings) for job in jobs for rank in range(bench.num_pods))
    started = time.monotonic()
    await bench.each(bench.api.create(PODS.path(namespace), unowned(pod)) for pod in pods)
    seconds = time.monotonic() - started
    bench.say(f"the bare loop made {bench.pods_in_all} pods in {seconds:.1f} s; clearing them away")
    await all_pods_run(bench, namespace)
    await clear(bench, namespace)
    return bench.pods_in_all / seconds


async def all_pods_run(bench: Bench, namespace: str) -> float:
    """Wait until no pod waits any more; return the time."""

    async def none_pending() -> bool:
        page = await bench.api.get(PODS.path(namespace), {"fieldSelector": "status.phase=Pending", "limit": "1"})
        return not page.get("items")

    return await bench.wait("pods run", none_pending)


async def clear(bench: Bench, namespace: str) -> None:
    """Delete all pods of a namespace at once and wait until the machine is quiet."""
    query = {"gracePeriodSeconds": "0"}
    await bench.api.request("DELETE", PODS.path(namespace), query=query, seconds=300)
    await bench.wait("pods are gone", lambda: bench.count(namespace, 0))


async def delete_pod(bench: Bench, namespace: str, pod: str) -> None:
    """Delete a pod as if its node had gone: at once."""
    await bench.api.delete(PODS.path(namespace, pod), {"gracePeriodSeconds": 0})


def manifest(namespace: str, number: int, num_pods: int) -> FineTuneJob:
    """A job as the API server would show it."""
    job = build_job(name(number), nodes=num_pods)
    job["metadata"] |= {"namespace": namespace, "uid": f"{number:08}-0000-0000-0000-000000000000"}
    return FineTuneJob.model_validate(job)


def unowned(pod: Json) -> Json:
    """A pod without the owner that is not there."""
    meta = {key: value for key, value in pod["metadata"].items() if key != "ownerReferences"}
    return {**pod, "metadata": meta}


def running_jobs(operator: OperatorProcess) -> float:
    """Number of running jobs, by the operator's own metrics."""
    found = operator.metrics()
    return sum(value for key, value in found.items() if key.startswith("finetune_jobs{") and 'phase="Running"' in key)


async def all_run(bench: Bench, operator: OperatorProcess) -> bool:
    """Whether all jobs run, looked at once a second: a look costs the operator a few milliseconds."""
    await asyncio.sleep(1.0)
    return running_jobs(operator) == bench.num_jobs


async def quiet(operator: OperatorProcess) -> bool:
    """Whether all that was to be told has been told: nothing is sent for a while."""
    before = requests(operator)
    await asyncio.sleep(SETTLE_SECONDS)
    return requests(operator) == before


class Gangs:
    """The supervisors of all pods of all jobs."""

    def __init__(self, bench: Bench, port: int, context: ssl.SSLContext) -> None:
        self._bench = bench
        self._port = port
        self._context = context
        self._tally = Tally()
        self._jobs: dict[str, list[Supervisor]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def join(self, pods: Iterable[Json], spread_seconds: float) -> None:
        """Let the supervisors of pods begin."""
        for one in await supervisors(self._bench, pods, self._tally):
            self._jobs.setdefault(one.job, []).append(one)
            self._tasks[one.pod] = asyncio.create_task(one.run(self._port, self._context, spread_seconds))

    def lose(self, job: str, pod: str) -> None:
        """A pod goes without a word, and the others of its gang find out in their next step."""
        self._tasks.pop(pod).cancel()
        self._jobs[job] = [one for one in self._jobs[job] if one.pod != pod]
        for one in self._jobs[job]:
            one.lose_a_peer()

    def stop(self) -> None:
        """End them all."""
        for task in self._tasks.values():
            task.cancel()


async def measure(bench: Bench, operator: OperatorProcess, idle_seconds: float) -> dict[str, object]:
    """All measurements."""
    bare = await bare_loop(bench)
    bench.note("bare loop", f"{bare:.0f} pods/s")
    namespace = bench.control_plane.create_namespace("jobs")
    await bench.create_jobs(namespace)
    with running(operator):
        assert operator.process is not None
        process = psutil.Process(operator.process.pid)
        # It leads since just before: nothing was created before this moment.
        started = time.monotonic()
        created = await bench.wait("all pods are created", lambda: bench.count(namespace, bench.pods_in_all))
        rate = bench.pods_in_all / (created - started)
        bench.note("operator", f"{rate:.0f} pods/s, {100 * rate / bare:.0f} % of the bare loop")
        ran = await all_pods_run(bench, namespace)
        bench.note("all pods run after", f"{ran - started:.1f} s")

        gangs = Gangs(bench, operator.coordinator_port, tls_context(bench.control_plane))
        await gangs.join(await bench.pods(namespace), CONNECT_SECONDS)
        bench.say(f"{bench.pods_in_all} supervisors begin to beat")
        await bench.wait("all jobs run", lambda: all_run(bench, operator))
        counts = requests(operator)
        per_job = sum(counts.values()) / bench.num_jobs
        bench.note("API requests per job", f"{per_job:.1f}")
        for key, value in sorted(counts.items()):
            print(f"  {value / bench.num_jobs:6.2f} {key}")
        rss = process.memory_info().rss / 2**20
        cpu = process.cpu_times()
        bench.note("memory", f"{rss:.0f} MiB, {cpu.user + cpu.system:.1f} CPU seconds")
        await bench.wait("events are sent", lambda: quiet(operator))
        idle = await idle_writes(operator, idle_seconds)
        bench.note("writes while idle", f"{idle:.0f} per minute, while all beat")
        recover = await recovery(bench, operator, gangs, namespace)
        rss = max(rss, process.memory_info().rss / 2**20)
        bench.note("memory in the end", f"{rss:.0f} MiB")
        gangs.stop()
    return {
        "jobs": bench.num_jobs,
        "pods": bench.pods_in_all,
        "create_rate_ratio": round(rate / bare, 3),
        "recover_seconds": round(recover, 1),
        "rss_mib": round(rss),
        "requests_per_job": round(per_job, 1),
        "idle_writes_per_minute": round(idle, 1),
    }


async def idle_writes(operator: OperatorProcess, seconds: float) -> float:
    """Writes per minute while nothing changes, the lease aside."""
    before = sum(requests(operator, writes_only=True).values())
    await asyncio.sleep(seconds)
    return (sum(requests(operator, writes_only=True).values()) - before) * 60 / seconds


async def recovery(bench: Bench, operator: OperatorProcess, gangs: Gangs, namespace: str) -> float:
    """Delete a pod of every job; seconds until every one of them is replaced."""
    rank = bench.num_pods - 1
    before = {pod["metadata"]["name"] for pod in await bench.pods(namespace)}
    started = time.monotonic()

    async def lose(job: str) -> None:
        pod = f"{job}-a1-n{rank}"
        await delete_pod(bench, namespace, pod)
        gangs.lose(job, pod)

    async def all_there() -> bool:
        await asyncio.sleep(1.0)
        pods = await bench.pods(namespace, f"{labels.ATTEMPT}!=1")
        fresh = [pod for pod in pods if pod["metadata"]["name"] not in joined]
        joined.update(pod["metadata"]["name"] for pod in fresh)
        await gangs.join(fresh, 0.0)
        return len(joined) >= bench.num_jobs

    joined: set[str] = set()
    deleting = asyncio.create_task(bench.each(lose(name(number)) for number in range(bench.num_jobs)))
    deleting.add_done_callback(lambda _: bench.say(f"{bench.num_jobs} pods are deleted"))
    replaced = await bench.wait("all pods are replaced", all_there)
    await deleting
    seconds = replaced - started
    ran = await bench.wait("all jobs run again", lambda: all_run(bench, operator))
    kept = before & {pod["metadata"]["name"] for pod in await bench.pods(namespace)}
    bench.note("one pod of every job replaced", f"after {seconds:.1f} s ({bench.num_jobs / seconds:.0f} jobs/s)")
    bench.note("all jobs train again", f"after {ran - started:.1f} s; {len(kept)} pods were kept")
    return seconds


async def main() -> None:
    """Read the command line, and measure."""
    options_of = parser("bench.operator", __doc__)
    options_of.add_argument("--idle-seconds", type=float, default=60.0, help="time without any change (default: 60)")
    options = options_of.parse_args()

    async def measured(bench: Bench, operator: OperatorProcess) -> dict[str, object]:
        bench.control_plane.add_nodes(NUM_NODES)
        return await measure(bench, operator, options.idle_seconds)

    await run(options, COMPONENTS, measured)


if __name__ == "__main__":
    asyncio.run(main())
