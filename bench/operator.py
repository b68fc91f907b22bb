"""The operator at scale, beside a bare loop that creates the same pods on the same control plane in the same run.

    python -m bench.operator [--jobs 1000] [--nodes-per-job 4]

Measured: pods created per second; resident memory; API requests per job; writes while nothing changes; and the time to
all replacements after one pod of every job was deleted. By then supervisors of all pods beat over TLS, as they would
on nodes (kwok's pods have none), so that each job recovers in place: its other pods stay, and their supervisors are
told of the new world. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import ssl
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.report import finish
from bench.supervisors import Supervisor, Tally
from finetune_operator.api import words
from finetune_operator.api.job import FineTuneJob
from finetune_operator.build import build_pod
from finetune_operator.cluster.kube.client import PARTIAL_LIST, Json, KubeApi, connect, each_page
from finetune_operator.cluster.kube.clock import ServerClock
from finetune_operator.cluster.kube.objects import JOBS, PODS
from finetune_operator.settings import Settings
from tests.controlplane.process import LOOPBACK
from tests.controlplane.server import ControlPlane
from tests.operator.bed import ACCOUNT, HOME, OperatorProcess, build_job, install, running
from tests.operator.talk import tls_context

NUM_NODES = 100
CONNECTIONS = 16
"""Requests of the bare loop, and of who makes and deletes things here, at a time."""
POLL_SECONDS = 0.25
LIMIT_SECONDS = 900.0
CONNECT_SECONDS = 15.0
"""Over so long the supervisors' first beats are spread, as the starts of their pods would be."""
PAGE = 500
SETTLE_SECONDS = 8.0
"""Longer than progress waits to be written."""


@dataclass
class Bench:
    """One control plane, and what was measured on it."""

    control_plane: ControlPlane
    api: KubeApi
    num_jobs: int
    num_pods: int
    idle_seconds: float = 60.0
    rows: list[tuple[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def pods_in_all(self) -> int:
        """Pods of all jobs together."""
        return self.num_jobs * self.num_pods

    def note(self, what: str, value: str) -> None:
        """Keep a row of the table, and show it."""
        self.rows.append((what, value))
        self.say(f"{what}: {value}")

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

    def say(self, what: str) -> None:
        """Tell how far it is."""
        print(f"{time.monotonic() - self.started:6.1f} s  {what}", flush=True)

    async def pods(self, namespace: str, selector: str = "") -> list[Json]:
        """The metadata of pods."""
        found: list[Json] = []
        query = {"limit": str(PAGE), "labelSelector": selector}
        async with aclosing(each_page(self.api, PODS.path(namespace), query, PARTIAL_LIST)) as pages:
            async for page in pages:
                found += page.get("items") or ()
        return found

    async def bare(self) -> float:
        """Pods per second of a loop that does nothing else."""
        namespace = self.control_plane.create_namespace("bare")
        jobs = [manifest(namespace, number, self.num_pods) for number in range(self.num_jobs)]
        settings = Settings()
        pods = (build_pod(job, 1, rank, settings) for job in jobs for rank in range(self.num_pods))
        started = time.monotonic()
        await self.each(self.api.create(PODS.path(namespace), unowned(pod)) for pod in pods)
        seconds = time.monotonic() - started
        self.say(f"the bare loop made {self.pods_in_all} pods in {seconds:.1f} s; clearing them away")
        await self.all_run(namespace)
        await self.clear(namespace)
        return self.pods_in_all / seconds

    async def all_run(self, namespace: str) -> float:
        """Wait until no pod waits any more; return the time."""

        async def none_pending() -> bool:
            page = await self.api.get(PODS.path(namespace), {"fieldSelector": "status.phase=Pending", "limit": "1"})
            return not page.get("items")

        return await self.wait("pods run", none_pending)

    async def clear(self, namespace: str) -> None:
        """Delete all pods of a namespace at once and wait until the machine is quiet."""
        query = {"gracePeriodSeconds": "0"}
        await self.api.request("DELETE", PODS.path(namespace), query=query, seconds=300)
        await self.wait("pods are gone", lambda: self.count(namespace, 0))

    async def create_jobs(self, namespace: str) -> None:
        """Create all jobs, while no operator runs."""
        jobs = (build_job(name(number), nodes=self.num_pods) for number in range(self.num_jobs))
        await self.each(self.api.create(JOBS.path(namespace), job) for job in jobs)

    async def delete_pod(self, namespace: str, pod: str) -> None:
        """Delete a pod as if its node had gone: at once."""
        await self.api.delete(PODS.path(namespace, pod), {"gracePeriodSeconds": 0})


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


async def supervisors(bench: Bench, pods: Iterable[Json], tally: Tally, *, steady: bool = True) -> list[Supervisor]:
    """One for each pod, with a token that the API server gave for it."""
    made: list[Supervisor] = []

    async def make(pod: Json) -> None:
        meta = pod["metadata"]
        reference = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
        audiences = [Settings().coordinator_audience]
        spec = {"audiences": audiences, "expirationSeconds": 3600, "boundObjectRef": reference}
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/default/token"
        answer = await bench.api.request("POST", path, request)
        made.append(Supervisor(pod, answer["status"]["token"], tally, steady=steady))

    await bench.each(make(pod) for pod in pods)
    return made


def coordinator_flags(control_plane: ControlPlane) -> tuple[str, ...]:
    """Flags of an operator that takes beats over TLS."""
    certificate = control_plane.authority.issue("coordinator", hosts=[LOOPBACK])
    return (
        "--lease-seconds=15",
        f"--coordinator-tls-cert={certificate.certificate}",
        f"--coordinator-tls-key={certificate.key}",
        "--coordinator-url=https://coordinator.invalid",
    )


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


async def measure(bench: Bench, operator: OperatorProcess, context: ssl.SSLContext) -> dict[str, object]:
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
        ran = await bench.all_run(namespace)
        bench.note("all pods run after", f"{ran - started:.1f} s")

        gangs = Gangs(bench, operator.coordinator_port, context)
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
        idle = await idle_writes(bench, operator)
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


async def idle_writes(bench: Bench, operator: OperatorProcess) -> float:
    """Writes per minute while nothing changes, the lease aside."""
    before = sum(requests(operator, writes_only=True).values())
    await asyncio.sleep(bench.idle_seconds)
    return (sum(requests(operator, writes_only=True).values()) - before) * 60 / bench.idle_seconds


async def recovery(bench: Bench, operator: OperatorProcess, gangs: Gangs, namespace: str) -> float:
    """Delete a pod of every job; seconds until every one of them is replaced."""
    rank = bench.num_pods - 1
    before = {pod["metadata"]["name"] for pod in await bench.pods(namespace)}
    started = time.monotonic()

    async def lose(job: str) -> None:
        pod = f"{job}-a1-n{rank}"
        await bench.delete_pod(namespace, pod)
        gangs.lose(job, pod)

    async def all_there() -> bool:
        await asyncio.sleep(1.0)
        pods = await bench.pods(namespace, f"{words.ATTEMPT}!=1")
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
    """Start a control plane, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.operator", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="number of FineTuneJobs (default: 1000)")
    parser.add_argument("--nodes-per-job", type=int, default=4, help="pods of each (default: 4)")
    parser.add_argument("--idle-seconds", type=float, default=60.0, help="time without any change (default: 60)")
    options = parser.parse_args()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with tempfile.TemporaryDirectory() as folder, ControlPlane() as control_plane:
        install(control_plane)
        control_plane.add_nodes(NUM_NODES)
        client = await connect(control_plane.kubeconfig, num_connections=CONNECTIONS)
        operator = OperatorProcess(
            control_plane.kubeconfig_for(ACCOUNT, HOME, expiration_seconds=7200),
            Path(folder) / "operator.log",
            coordinator_flags(control_plane),
        )
        api = KubeApi(client, ServerClock())
        bench = Bench(control_plane, api, options.jobs, options.nodes_per_job, options.idle_seconds)
        try:
            result = await measure(bench, operator, tls_context(control_plane))
        except BaseException:
            print("\n".join(operator.log.read_text().splitlines()[-40:]) if operator.log.exists() else "no log")
            raise
        finally:
            await client.close()
    finish(("measurement", "value"), bench.rows, result)


if __name__ == "__main__":
    asyncio.run(main())
