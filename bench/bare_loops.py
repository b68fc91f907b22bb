"""Loops that do only what no operator can avoid, on the same control plane: the limits of `bench.operator`.

They create the pods of all jobs, and then replace one pod of every job. With a queue, each job is first requested from
Kueue, and its pods are created when it is admitted. Without one, a further loop creates the objects of the operator:
it writes the status that begins the first attempt, and creates a ConfigMap and the pods of each job.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime

from bench.process_meter import ProcessMeter, describe_cpu
from bench.scale import CONNECTIONS, COORDINATOR_URL, LIMIT_SECONDS, OperatorBench, job_name, repeat
from finetune_operator.api.job import FineTuneJob, ObjectMeta
from finetune_operator.api.names import pod_name
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.cluster.kube.client.client import ApiError, Json, delete_if_present
from finetune_operator.cluster.kube.client.objects import CONFIGS, JOBS, PODS, status_body
from finetune_operator.cluster.kube.queue.workloads import WORKLOADS
from finetune_operator.manifests import build_config, build_pod
from finetune_operator.manifests.workload import build_workload, workload_name
from finetune_operator.plan import plan
from finetune_operator.plan.model import ledger
from finetune_operator.plan.model.types import Observed
from finetune_operator.settings import Settings
from testing.operator.harness import build_job

NUM_NODES = 100
NAMESPACE, SAME_OBJECTS = "bare", "same"
GATEWAY_TIMEOUT = 504
MAX_DELETIONS = 10
SETTINGS = Settings(coordinator_url=COORDINATOR_URL)
"""Settings of the operator that decide what its pods contain: these loops create the same ones."""


async def warm_up(bench: OperatorBench) -> None:
    """Run a pod on every node, so that scheduler and kwok are active in all measurements, as in a real cluster.

    If the scheduler became active late, the bare loop would have the API server for itself.
    """
    namespace = bench.control_plane.create_namespace("warm")
    job = manifest(namespace, 0, NUM_NODES)
    await bench.run_all(create_pod(bench, job, rank) for rank in range(NUM_NODES))
    await all_pods_run(bench)
    await clear(bench, PODS.path(namespace))


@dataclass(frozen=True)
class Limits:
    """Results of the loops."""

    rate: float
    """Pods per second if nothing else is created."""
    rate_of_same_objects: float | None
    """Pods per second of a loop that creates the operator's objects; None: with a queue it is not measured."""
    recover_seconds: float


async def bare_loops(bench: OperatorBench) -> Limits:
    """Measure loops that do nothing else."""
    await warm_up(bench)
    bench.create_namespaces(NAMESPACE)
    spec = {} if bench.queue is None else {"queueName": NAMESPACE}
    jobs = [
        manifest(bench.namespace_of(NAMESPACE, number), number, bench.num_pods, **spec)
        for number in range(bench.num_jobs)
    ]
    if bench.queue is not None:
        bench.add_queues(NAMESPACE, NAMESPACE)
    meter = ProcessMeter(bench.control_plane.programs)
    started, cpu_seconds = time.monotonic(), meter.cpu_seconds()
    if bench.queue is None:
        await bench.run_all(create_pod(bench, job, rank) for job in jobs for rank in range(bench.num_pods))
    else:
        await create_admitted(bench, jobs)
    rate, cpu_ms = bench.total_pods / (time.monotonic() - started), meter.cpu_ms_since(cpu_seconds, bench.num_jobs)
    bench.add_row("bare loop", f"{rate:.0f} pods/s")
    bench.add_row("CPU time per job of that, all processes", describe_cpu(cpu_ms))
    await all_pods_run(bench)
    recover_seconds = await bare_recoveries(bench)
    for namespace in bench.namespaces_of(NAMESPACE):
        await clear(bench, PODS.path(namespace))
        if bench.queue is not None:
            await clear(bench, WORKLOADS.path(namespace))
    same = await same_objects(bench) if bench.queue is None else None
    return Limits(rate, same, recover_seconds)


async def same_objects(bench: OperatorBench) -> float:
    """Return the pods per second of a loop that creates the same objects as the operator."""
    bench.create_namespaces(SAME_OBJECTS)
    jobs = await store_jobs(bench, SAME_OBJECTS)
    meter = ProcessMeter(bench.control_plane.programs)
    started, cpu_seconds = time.monotonic(), meter.cpu_seconds()
    await bench.run_all(create_objects(bench, job) for job in jobs)
    rate, cpu_ms = bench.total_pods / (time.monotonic() - started), meter.cpu_ms_since(cpu_seconds, bench.num_jobs)
    bench.add_row("loop that creates the operator's objects", f"{rate:.0f} pods/s")
    bench.add_row("CPU time per job of that, all processes", describe_cpu(cpu_ms))
    await all_pods_run(bench)
    for namespace in bench.namespaces_of(SAME_OBJECTS):
        for resource in (PODS, CONFIGS, JOBS):
            await delete_all(bench, resource.path(namespace))
        await clear(bench, PODS.path(namespace))
    return rate


async def create_objects(bench: OperatorBench, job: FineTuneJob) -> None:
    """Write the status that begins the first attempt of a job, and create its objects, one after the other."""
    name, namespace = job.metadata.name, job.metadata.namespace
    await bench.api.replace(JOBS.path(namespace, name, "status"), status_body(job, job.status))
    await bench.api.create(CONFIGS.path(namespace), unowned(build_config(job)))
    for rank in range(bench.num_pods):
        await create_pod(bench, job, rank)


async def store_jobs(bench: OperatorBench, name: str) -> list[FineTuneJob]:
    """Create all jobs in the namespaces with a name; return them with the status that begins their first attempt."""
    stored: list[FineTuneJob] = []

    async def store(job: FineTuneJob) -> None:
        path = JOBS.path(job.metadata.namespace)
        created = await bench.api.create(path, build_job(job.metadata.name, nodes=bench.num_pods))
        meta = ObjectMeta.model_validate(created["metadata"])
        first = plan(job, Observed(), datetime.now(UTC), SETTINGS).status
        stored.append(job.model_copy(update={"metadata": meta, "status": first}))

    jobs = (manifest(bench.namespace_of(name, number), number, bench.num_pods) for number in range(bench.num_jobs))
    await bench.run_all(map(store, jobs))
    return stored


async def create_admitted(bench: OperatorBench, jobs: list[FineTuneJob]) -> None:
    """Request all jobs from their queue, and create the pods of each when Kueue has admitted it."""
    waiting = {(job.metadata.namespace, workload_name(job)): job for job in jobs}
    async with asyncio.TaskGroup() as tasks:
        requests = (build_workload(job, SETTINGS) for job in jobs)
        create = (
            bench.api.create(WORKLOADS.path(request["metadata"]["namespace"]), unowned(request)) for request in requests
        )
        requesting = tasks.create_task(bench.run_all(create))
        slots = asyncio.Semaphore(CONNECTIONS)
        query = {"timeoutSeconds": f"{LIMIT_SECONDS:.0f}"}
        async with aclosing(bench.api.watch(WORKLOADS.path(), query)) as events:
            async for event in events:
                workload = event["object"]
                conditions = (workload.get("status") or {}).get("conditions") or ()
                if any(each["type"] == "Admitted" and each["status"] == "True" for each in conditions):
                    meta = workload["metadata"]
                    job = waiting.pop((meta["namespace"], meta["name"]), None)
                    if job is not None:
                        tasks.create_task(create_pods(bench, job, slots))
                if not waiting:
                    break
        await requesting


async def create_pods(bench: OperatorBench, job: FineTuneJob, slots: asyncio.Semaphore) -> None:
    """Create all pods of a job, one after the other, as the operator does."""
    async with slots:
        for rank in range(bench.num_pods):
            await create_pod(bench, job, rank)


async def create_pod(bench: OperatorBench, job: FineTuneJob, node_rank: int, attempt: int = 1) -> None:
    """Create a pod without its owner, which does not exist."""
    pod = unowned(build_pod(job, attempt, node_rank, SETTINGS))
    await bench.api.create(PODS.path(job.metadata.namespace), pod)


async def bare_recoveries(bench: OperatorBench) -> float:
    """Return the seconds in which a loop replaces one pod of every job, with one write of each status."""
    node_rank = bench.num_pods - 1

    async def replace(job: FineTuneJob) -> None:
        ended = ledger.replace_current(job.status, _lost(job.status))
        status = ledger.begin(ended, 2, datetime.now(UTC), SETTINGS.max_attempts_kept)
        name, namespace = job.metadata.name, job.metadata.namespace
        await delete_pod(bench, namespace, pod_name(name, 1, node_rank))
        await bench.api.replace(JOBS.path(namespace, name, "status"), status_body(job, status))
        await create_pod(bench, job, node_rank, attempt=2)

    jobs = await store_jobs(bench, NAMESPACE)
    meter = ProcessMeter(bench.control_plane.programs)
    started, cpu_seconds = time.monotonic(), meter.cpu_seconds()
    await bench.run_all(map(replace, jobs))
    seconds, cpu_ms = time.monotonic() - started, meter.cpu_ms_since(cpu_seconds, bench.num_jobs)
    bench.add_row("bare loop, one pod of every job replaced", f"after {seconds:.1f} s")
    bench.add_row("CPU time per job of that, all processes", describe_cpu(cpu_ms))
    for namespace in bench.namespaces_of(NAMESPACE):
        await delete_all(bench, JOBS.path(namespace))
    return seconds


def _lost(status: FineTuneJobStatus) -> AttemptStatus:
    """Return the entry of an attempt that ended because a pod was lost."""
    entry = status.attempts[-1]
    message = "the pod was deleted while it ran"
    ended = {"ended_at": entry.started_at, "reason": Reason.POD_LOST.value, "message": message, "node": "node-1"}
    return entry.model_copy(update=ended)


async def all_pods_run(bench: OperatorBench) -> float:
    """Wait until no pod is pending; return the time."""

    async def none_pending() -> bool:
        page = await bench.get(PODS.path(), {"fieldSelector": "status.phase=Pending", "limit": "1"})
        return not page.get("items")

    return await bench.wait("pods run", none_pending)


async def clear(bench: OperatorBench, path: str) -> None:
    """Delete all objects of a collection, and wait until none is left."""
    await delete_all(bench, path)

    async def is_empty() -> bool:
        return await bench.count(path) == 0

    await bench.wait(f"nothing is left at {path}", is_empty)


async def delete_all(bench: OperatorBench, path: str) -> None:
    """Delete all objects at a path. The API server ends a request after a minute, and 10,000 pods take longer."""
    for _ in range(MAX_DELETIONS):
        try:
            await bench.api.request("DELETE", path, query={"gracePeriodSeconds": "0"}, seconds=300)
        except ApiError as error:
            if error.status != GATEWAY_TIMEOUT:
                raise
        else:
            return
    raise TimeoutError(path)


async def delete_pod(bench: OperatorBench, namespace: str, pod: str) -> None:
    """Delete a pod without a grace period, as if its node had been lost."""
    options = {"gracePeriodSeconds": 0}
    # A request without an answer may have deleted it.
    await repeat(lambda: delete_if_present(bench.api, PODS.path(namespace, pod), options))


def manifest(namespace: str, number: int, num_pods: int, **spec: object) -> FineTuneJob:
    """Return a job as the API server stores it."""
    job = build_job(job_name(number), nodes=num_pods, **spec)
    job["metadata"] |= {"namespace": namespace, "uid": f"{number:08}-0000-0000-0000-000000000000"}
    return FineTuneJob.model_validate(job)


def unowned(manifest: Json) -> Json:
    """Return a manifest without its owner, which does not exist."""
    meta = {key: value for key, value in manifest["metadata"].items() if key != "ownerReferences"}
    return {**manifest, "metadata": meta}
