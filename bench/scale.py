"""Shared parts of the operator benchmarks: a control plane with the operator's roles, and thousands of jobs."""

from __future__ import annotations

import argparse
import asyncio
import math
import resource
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar

from bench.supervisors import BenchSupervisor, HeartbeatCounts
from finetune_operator.cluster.kube.client.client import (
    JSON,
    PARTIAL_LIST,
    ApiError,
    Json,
    KubeApi,
    connect,
    iterate_pages,
)
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.client.objects import JOBS, PODS
from finetune_operator.settings import Settings
from testing.controlplane.process import LOOPBACK
from testing.controlplane.queues import Kueue
from testing.controlplane.server import ControlPlane
from testing.measure.report import finish
from testing.operator.harness import ACCOUNT, HOME, OperatorProcess, build_job, install

T = TypeVar("T")

CONNECTIONS = 16
"""Number of concurrent requests of the bare loop and of other creations and deletions."""
POLL_SECONDS = 1.0
"""A list of one pod takes the API server some milliseconds, because it counts the others."""
LIMIT_SECONDS = 900.0
MAX_TRIES = 60
PAGE = 500
JOBS_PER_NAMESPACE = 1000
"""Thousands of jobs belong to many teams, and the endpoint controllers of Kubernetes read all pods of a namespace
at each change of one."""
SPARE_CONNECTIONS = 1000
"""Connections of supervisors that the operator accepts beyond one for each pod."""
COORDINATOR_URL = "https://coordinator.invalid"
"""Address in the pods, whose supervisors run in the benchmark."""
QUEUE = "bench"
"""Name of the queue that admits all jobs at once, with --queue."""
LOG_LINES = 40
"""Number of lines of the operator's log that are printed if a benchmark fails."""


@dataclass
class OperatorBench:
    """A control plane, and the results measured on it."""

    control_plane: ControlPlane
    api: KubeApi
    num_jobs: int
    num_pods: int
    rows: list[tuple[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    queue: Kueue | None = None
    """Kueue's controller, if the jobs wait for a queue."""
    namespaces: dict[tuple[str, int], str] = field(default_factory=dict)
    """By the name that the benchmark gave, and by number."""

    @property
    def total_pods(self) -> int:
        """Number of pods of all jobs."""
        return self.num_jobs * self.num_pods

    def add_row(self, what: str, value: str) -> None:
        """Add a row to the result table, and print it."""
        self.rows.append((what, value))
        self.print_status(f"{what}: {value}")

    async def run_all(self, work: Iterable[Coroutine[Any, Any, Any]]) -> None:
        """Run coroutines, at most `CONNECTIONS` at a time."""
        queue = iter(work)

        async def worker(first: Coroutine[Any, Any, Any]) -> None:
            await first
            for coroutine in queue:
                await coroutine

        await asyncio.gather(*map(worker, list(islice(queue, CONNECTIONS))))

    async def wait(self, what: str, done: Callable[[], Coroutine[Any, Any, bool]]) -> float:
        """Wait until a condition holds; return the time."""
        started = time.monotonic()
        while not await done():
            if time.monotonic() - started > LIMIT_SECONDS:
                raise TimeoutError(what)
            await asyncio.sleep(POLL_SECONDS)
        return time.monotonic()

    async def get(self, path: str, query: Mapping[str, str], accept: str = JSON) -> Json:
        """Read a list; again while the API server is too busy to answer."""
        return await repeat(lambda: self.api.get(path, query, accept))

    async def count(self, path: str) -> int:
        """Return the number of objects of a collection; only one of them is transferred."""
        page = await self.get(path, {"limit": "1"}, PARTIAL_LIST)
        return len(page.get("items") or ()) + int(page["metadata"].get("remainingItemCount") or 0)

    async def has_pods(self, number: int) -> bool:
        """Return whether exactly this number of pods exists."""
        return await self.count(PODS.path()) == number

    async def newest_pod(self) -> datetime:
        """Return when the newest pod was created, in whole seconds, by the API server's clock."""
        return max(datetime.fromisoformat(pod["metadata"]["creationTimestamp"]) for pod in await self.pods())

    def print_status(self, what: str) -> None:
        """Print a line with the elapsed time."""
        print(f"{time.monotonic() - self.started:6.1f} s  {what}", flush=True)

    async def pods(self) -> list[Json]:
        """Return the metadata of all pods."""
        found: list[Json] = []
        async with aclosing(iterate_pages(self, PODS.path(), {"limit": str(PAGE)}, PARTIAL_LIST)) as pages:
            async for page in pages:
                found += page.get("items") or ()
        return found

    def create_namespaces(self, name: str) -> None:
        """Create as many namespaces as the jobs need. `namespace_of` returns them."""
        for number in range(math.ceil(self.num_jobs / JOBS_PER_NAMESPACE)):
            self.namespaces[name, number] = self.control_plane.create_namespace(f"{name}-{number}")

    def namespaces_of(self, name: str) -> list[str]:
        """Return the namespaces with a name."""
        return [namespace for (each, _), namespace in self.namespaces.items() if each == name]

    def namespace_of(self, name: str, job: int) -> str:
        """Return the namespace of a job."""
        return self.namespaces[name, job // JOBS_PER_NAMESPACE]

    async def create_jobs(self, name: str) -> None:
        """Create all jobs in their namespaces, before the operator runs."""
        spec = {}
        self.create_namespaces(name)
        if self.queue is not None:
            spec["queueName"] = QUEUE
            self.add_queues(QUEUE, name)
        await self.run_all(
            self.api.create(
                JOBS.path(self.namespace_of(name, number)), build_job(job_name(number), nodes=self.num_pods, **spec)
            )
            for number in range(self.num_jobs)
        )

    def add_queues(self, queue: str, name: str) -> None:
        """Add a queue to each of these namespaces that admits all jobs at once."""
        assert self.queue is not None
        self.queue.apply("resourceflavors", QUEUE, {})
        for namespace in self.namespaces_of(name):
            self.queue.add_queue(queue, namespace, [{"name": QUEUE, "cpu": 2 * self.total_pods, "memory": "1Pi"}])


async def repeat(request: Callable[[], Awaitable[T]]) -> T:
    """Send a request, and again while the API server is too busy to answer, as kubelets do."""
    for _ in range(MAX_TRIES):
        try:
            return await request()
        except ApiError as error:
            if not error.transient:
                raise
        await asyncio.sleep(POLL_SECONDS)
    raise TimeoutError


def job_number(name: str) -> int:
    """Return the number of a job."""
    return int(name.rpartition("-")[2])


def job_name(number: int) -> str:
    """Return the name of a job."""
    return f"job-{number:04}"


def count_requests(operator: OperatorProcess, *, writes_only: bool = False) -> dict[str, float]:
    """Return the number of requests so far, by labels, without those for the lease and the watches."""
    counts = {}
    for key, value in operator.metrics().items():
        if not key.startswith("finetune_api_requests_total") or "leases" in key or 'method="WATCH"' in key:
            continue
        if writes_only and 'method="GET"' in key:
            continue
        counts[key.removeprefix("finetune_api_requests_total")] = value
    return counts


async def create_supervisors(
    bench: OperatorBench, pods: Iterable[Json], counts: HeartbeatCounts, *, steady: bool = True
) -> list[BenchSupervisor]:
    """Create a supervisor for each pod, with a token from the API server."""
    created: list[BenchSupervisor] = []

    async def create(pod: Json) -> None:
        meta = pod["metadata"]
        reference = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
        audiences = [Settings().coordinator_audience]
        spec = {"audiences": audiences, "expirationSeconds": 3600, "boundObjectRef": reference}
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/default/token"
        answer = await repeat(lambda: bench.api.request("POST", path, request))
        created.append(BenchSupervisor(pod, answer["status"]["token"], counts, steady=steady))

    await bench.run_all(create(pod) for pod in pods)
    return created


def coordinator_flags(control_plane: ControlPlane) -> tuple[str, ...]:
    """Return the flags of an operator that receives heartbeats over TLS."""
    certificate = control_plane.authority.issue("coordinator", hosts=[LOOPBACK])
    return (
        "--lease-seconds=15",
        f"--coordinator-tls-cert={certificate.certificate}",
        f"--coordinator-tls-key={certificate.key}",
        f"--coordinator-url={COORDINATOR_URL}",
    )


def create_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """Return the command line of a benchmark: the number and the size of the jobs."""
    created = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    created.add_argument("--jobs", type=int, default=1000, help="number of FineTuneJobs (default: 1000)")
    created.add_argument("--nodes-per-job", type=int, default=4, help="pods of each job (default: 4)")
    created.add_argument("--queue", action="store_true", help="let a queue of Kueue admit the jobs")
    return created


Measure = Callable[[OperatorBench, OperatorProcess], Awaitable[dict[str, object]]]
"""Starts the operator, and returns the content of the last line."""


async def run_bench(options: argparse.Namespace, components: Collection[str], measure: Measure) -> None:
    """Start a control plane with these components in addition to etcd and the API server, measure, print."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with ExitStack() as stack:
        control_plane = stack.enter_context(ControlPlane(components))
        queue = stack.enter_context(Kueue(control_plane)) if options.queue else None
        install(control_plane, queues=queue is not None)
        client = await connect(control_plane.kubeconfig, num_connections=CONNECTIONS)
        num_connections = options.jobs * options.nodes_per_job + SPARE_CONNECTIONS
        flags = (*coordinator_flags(control_plane), f"--max-connections={num_connections}")
        operator = OperatorProcess(
            control_plane.kubeconfig_for(ACCOUNT, HOME, expiration_seconds=7200),
            control_plane.folder / "operator.log",
            (*flags, *(("--kueue=true",) if queue is not None else ())),
        )
        api = KubeApi(client, ServerClock())
        bench = OperatorBench(control_plane, api, options.jobs, options.nodes_per_job, queue=queue)
        try:
            result = await measure(bench, operator)
        except BaseException:
            lines = operator.log.read_text().splitlines() if operator.log.exists() else ["no log"]
            print("\n".join(lines[-LOG_LINES:]))
            raise
        finally:
            await client.close()
    finish(("measurement", "value"), bench.rows, result)
