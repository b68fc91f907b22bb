"""What the benches of the operator share: a control plane with the operator's role on it, and thousands of jobs."""

from __future__ import annotations

import argparse
import asyncio
import resource
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from bench.supervisors import Supervisor, Tally
from finetune_operator.cluster.kube.client.client import PARTIAL_LIST, Json, KubeApi, connect, each_page
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.client.objects import JOBS, PODS
from finetune_operator.settings import Settings
from testing.controlplane.process import LOOPBACK
from testing.controlplane.server import ControlPlane
from testing.measure.report import finish
from testing.operator.harness import ACCOUNT, HOME, OperatorProcess, build_job, install

CONNECTIONS = 16
"""Requests of the bare loop, and of who makes and deletes things here, at a time."""
POLL_SECONDS = 0.25
LIMIT_SECONDS = 900.0
PAGE = 500
LOG_LINES = 40
"""The end of the operator's log that is shown where a bench fails."""


@dataclass
class Bench:
    """One control plane, and what was measured on it."""

    control_plane: ControlPlane
    api: KubeApi
    num_jobs: int
    num_pods: int
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

    async def create_jobs(self, namespace: str) -> None:
        """Create all jobs, while no operator runs."""
        jobs = (build_job(name(number), nodes=self.num_pods) for number in range(self.num_jobs))
        await self.each(self.api.create(JOBS.path(namespace), job) for job in jobs)


def name(number: int) -> str:
    """Name of a job."""
    return f"job-{number:04}"


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


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a bench: how many jobs, and how large."""
    made = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    made.add_argument("--jobs", type=int, default=1000, help="number of FineTuneJobs (default: 1000)")
    made.add_argument("--nodes-per-job", type=int, default=4, help="pods of each (default: 4)")
    return made


Measure = Callable[[Bench, OperatorProcess], Awaitable[dict[str, object]]]
"""Starts the operator itself, and answers with the last line."""


async def run(options: argparse.Namespace, components: Collection[str], measure: Measure) -> None:
    """Start a control plane with these components beside etcd and the API server, measure, print."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with ControlPlane(components) as control_plane:
        install(control_plane)
        client = await connect(control_plane.kubeconfig, num_connections=CONNECTIONS)
        operator = OperatorProcess(
            control_plane.kubeconfig_for(ACCOUNT, HOME, expiration_seconds=7200),
            control_plane.folder / "operator.log",
            coordinator_flags(control_plane),
        )
        bench = Bench(control_plane, KubeApi(client, ServerClock()), options.jobs, options.nodes_per_job)
        try:
            result = await measure(bench, operator)
        except BaseException:
            lines = operator.log.read_text().splitlines() if operator.log.exists() else ["no log"]
            print("\n".join(lines[-LOG_LINES:]))
            raise
        finally:
            await client.close()
    finish(("measurement", "value"), bench.rows, result)
