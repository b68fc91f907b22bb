"""The operator at scale, beside a bare loop that creates the same pods on the same control plane in the same run.

    python -m bench.operator [--jobs 1000] [--nodes-per-job 4]

Measured: pods created per second; the time until every job is whole again after one pod of each was deleted; resident
memory; API requests per job; and writes while nothing changes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.report import finish
from finetune_operator.api import words
from finetune_operator.api.job import FineTuneJob
from finetune_operator.build import build_pod
from finetune_operator.cluster.kube.client import PARTIAL_LIST, Json, KubeApi, connect
from finetune_operator.cluster.kube.clock import ServerClock
from finetune_operator.cluster.kube.objects import JOBS, PODS
from finetune_operator.settings import Settings
from tests.controlplane.server import ControlPlane
from tests.operator.bed import ACCOUNT, HOME, OperatorProcess, build_job, install, running

NUM_NODES = 100
CONNECTIONS = 16
"""Requests of the bare loop, and of who makes and deletes things here, at a time."""
POLL_SECONDS = 0.25
LIMIT_SECONDS = 900.0
IDLE_SECONDS = 60.0
SETTLE_SECONDS = 8.0
"""Longer than progress waits to be written."""


@dataclass
class Bench:
    """One control plane, and what was measured on it."""

    control_plane: ControlPlane
    api: KubeApi
    num_jobs: int
    num_pods: int
    rows: list[tuple[str, str]] = field(default_factory=list)

    @property
    def pods_in_all(self) -> int:
        """Pods of all jobs together."""
        return self.num_jobs * self.num_pods

    def note(self, what: str, value: str) -> None:
        """Keep a row of the table, and show it."""
        self.rows.append((what, value))
        print(f"{what}: {value}", flush=True)

    async def each(self, work: Iterable[Coroutine[Any, Any, Any]]) -> None:
        """Do many things, `CONNECTIONS` at a time."""
        queue = iter(work)

        async def worker() -> None:
            for one in queue:
                await one

        await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))

    async def wait(self, what: str, done: Callable[[], Coroutine[Any, Any, bool]]) -> float:
        """Wait until something holds; return the time."""
        started = time.monotonic()
        while not await done():
            if time.monotonic() - started > LIMIT_SECONDS:
                raise TimeoutError(what)
            await asyncio.sleep(POLL_SECONDS)
        return time.monotonic()

    async def num_living(self, namespace: str) -> int:
        """Number of pods in a namespace, at the price of one."""
        page = await self.api.get(PODS.path(namespace), {"limit": "1"}, PARTIAL_LIST)
        return len(page.get("items") or ()) + int(page["metadata"].get("remainingItemCount") or 0)

    async def count(self, namespace: str, number: int) -> bool:
        """Whether there are so many pods."""
        return await self.num_living(namespace) == number

    async def num_of_attempt(self, namespace: str, attempt: int) -> int:
        """Number of pods of one attempt."""
        query = {"labelSelector": f"{words.ATTEMPT}={attempt}"}
        page = await self.api.get(PODS.path(namespace), query, PARTIAL_LIST)
        return len(page.get("items") or ())

    async def bare(self) -> float:
        """Pods per second of a loop that does nothing else."""
        namespace = self.control_plane.create_namespace("bare")
        jobs = [manifest(namespace, number, self.num_pods) for number in range(self.num_jobs)]
        settings = Settings()
        pods = (build_pod(job, 1, rank, settings) for job in jobs for rank in range(self.num_pods))
        started = time.monotonic()
        await self.each(self.api.create(PODS.path(namespace), unowned(pod)) for pod in pods)
        seconds = time.monotonic() - started
        await self._all_run(namespace)
        await self.clear(namespace)
        return self.pods_in_all / seconds

    async def _all_run(self, namespace: str) -> None:
        async def none_pending() -> bool:
            page = await self.api.get(PODS.path(namespace), {"fieldSelector": "status.phase=Pending", "limit": "1"})
            return not page.get("items")

        await self.wait("pods run", none_pending)

    async def clear(self, namespace: str) -> None:
        """Delete all pods of a namespace at once and wait until the machine is quiet."""
        query = {"gracePeriodSeconds": "0"}
        await self.api.request("DELETE", PODS.path(namespace), query=query, seconds=300)
        await self.wait("pods are gone", lambda: self.count(namespace, 0))

    async def create_jobs(self, namespace: str) -> None:
        """Create all jobs, while no operator runs."""
        jobs = (build_job(name(number), nodes=self.num_pods) for number in range(self.num_jobs))
        await self.each(self.api.create(JOBS.path(namespace), job) for job in jobs)

    async def delete_one_each(self, namespace: str) -> None:
        """Delete one pod of every job."""
        rank = self.num_pods - 1
        names = (f"{name(number)}-a1-n{rank}" for number in range(self.num_jobs))
        await self.each(self.api.delete(PODS.path(namespace, pod), {"gracePeriodSeconds": 0}) for pod in names)


def name(number: int) -> str:
    """Name of a job."""
    return f"job-{number:04}"


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


def requests(operator: OperatorProcess, *, writes_only: bool = False) -> dict[str, float]:
    """Requests so far, those for the lease and the watches aside."""
    counts = {}
    for key, value in operator.metrics().items():
        if not key.startswith("finetune_api_requests_total") or "leases" in key or 'method="WATCH"' in key:
            continue
        if writes_only and 'method="GET"' in key:
            continue
        counts[key.removeprefix("finetune_api_requests_total")] = value
    return counts


async def all_run(bench: Bench, operator: OperatorProcess) -> bool:
    """Whether all jobs run, looked at once a second: a look costs the operator a few milliseconds."""
    await asyncio.sleep(1.0)
    return running_jobs(operator) == bench.num_jobs


async def quiet(operator: OperatorProcess) -> bool:
    """Whether all that was to be told has been told: nothing is sent for a while."""
    before = requests(operator)
    await asyncio.sleep(SETTLE_SECONDS)
    return requests(operator) == before


async def measure(bench: Bench, operator: OperatorProcess) -> dict[str, object]:
    """All measurements."""
    bare = await bench.bare()
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

        ran = await bench.wait("all jobs run", lambda: all_run(bench, operator))
        bench.note("all jobs run after", f"{ran - started:.1f} s")
        counts = requests(operator)
        per_job = sum(counts.values()) / bench.num_jobs
        bench.note("API requests per job", f"{per_job:.1f}")
        for key, value in sorted(counts.items()):
            print(f"  {value / bench.num_jobs:6.2f} {key}")
        rss = process.memory_info().rss / 2**20
        cpu = process.cpu_times()
        bench.note("memory", f"{rss:.0f} MiB, {cpu.user + cpu.system:.1f} CPU seconds")
        await bench.wait("events are sent", lambda: quiet(operator))
        idle = await idle_writes(operator)
        bench.note("writes while idle", f"{idle:.0f} per minute")
        recover = await recovery(bench, operator, namespace)
        rss = max(rss, process.memory_info().rss / 2**20)
        bench.note("memory in the end", f"{rss:.0f} MiB")
    return {
        "jobs": bench.num_jobs,
        "pods": bench.pods_in_all,
        "create_rate_ratio": round(rate / bare, 3),
        "recover_seconds": round(recover, 1),
        "rss_mib": round(rss),
        "requests_per_job": round(per_job, 1),
        "idle_writes_per_minute": round(idle, 1),
    }


async def idle_writes(operator: OperatorProcess) -> float:
    """Writes in a minute in which nothing changes, the lease aside."""
    before = sum(requests(operator, writes_only=True).values())
    await asyncio.sleep(IDLE_SECONDS)
    return (sum(requests(operator, writes_only=True).values()) - before) * 60 / IDLE_SECONDS


async def recovery(bench: Bench, operator: OperatorProcess, namespace: str) -> float:
    """Delete a pod of every job; seconds until all pods of all next attempts are there."""
    started = time.monotonic()

    async def all_there() -> bool:
        await asyncio.sleep(1.0)
        return await bench.num_of_attempt(namespace, 2) == bench.pods_in_all

    deleting = asyncio.create_task(bench.delete_one_each(namespace))
    replaced = await bench.wait("all pods are replaced", all_there)
    await deleting

    ran = await bench.wait("all jobs run again", lambda: all_run(bench, operator))
    seconds = replaced - started
    rate = bench.pods_in_all / seconds
    bench.note(
        "all pods replaced", f"after {seconds:.1f} s ({rate:.0f} pods/s); all jobs run after {ran - started:.1f} s"
    )
    return seconds


async def main() -> None:
    """Start a control plane, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.operator", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="number of FineTuneJobs (default: 1000)")
    parser.add_argument("--nodes-per-job", type=int, default=4, help="pods of each (default: 4)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ControlPlane() as control_plane:
        install(control_plane)
        control_plane.add_nodes(NUM_NODES)
        client = await connect(control_plane.kubeconfig, num_connections=CONNECTIONS)
        operator = OperatorProcess(
            control_plane.kubeconfig_for(ACCOUNT, HOME, expiration_seconds=7200),
            Path(folder) / "operator.log",
            ("--lease-seconds=15",),
        )
        bench = Bench(control_plane, KubeApi(client, ServerClock()), options.jobs, options.nodes_per_job)
        try:
            result = await measure(bench, operator)
        except BaseException:
            print("\n".join(operator.log.read_text().splitlines()[-40:]) if operator.log.exists() else "no log")
            raise
        finally:
            await client.close()
    finish(("measurement", "value"), bench.rows, result)


if __name__ == "__main__":
    asyncio.run(main())
