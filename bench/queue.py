"""Benchmark of queues: many jobs in three queues of a cohort, with Kueue's real controller and the operator's own role.

    python -m bench.queue [--jobs 200] [--seed 0]

The queues borrow from each other and take their quota back; jobs of a higher priority preempt others; spot nodes
vanish; quotas shrink; a queue is stopped and drained. kwok's pods run no trainer, so `bench.queue_watch` stands in for
them.

`missing`: what did not happen although the benchmark is about it, e.g. no job borrowed; then the exit code is 1.
`unadmitted_pods`: pods that were created, or still existed, while their job had no quota. `lost`: jobs that did not end
with all their steps. `saved_before_yield_share`: evictions before which every finished step was saved. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.queue_watch import TrainedJob, Trainers
from bench.scale import LOG_LINES, OperatorBench
from finetune_contract.exit_codes import ExitCode
from finetune_operator.api import kueue
from finetune_operator.cluster.kube.client.client import ApiError, KubeApi, connect
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.client.objects import JOBS
from finetune_operator.cluster.kube.queue.workloads import WORKLOADS
from testing.controlplane.queues import Kueue
from testing.controlplane.server import ControlPlane
from testing.measure.report import finish
from testing.operator.harness import ACCOUNT, HOME, OperatorProcess, build_job, install, running

QUEUES = ("team-a", "team-b", "team-c")
PREEMPTION = {"withinClusterQueue": "LowerPriority", "reclaimWithinCohort": "Any"}
SPOT_CPUS, OTHER_CPUS = 8, 4
"""Nominal quota of each queue."""
NODE_CPUS = 4
DISTURBANCES = ("shrink", "node", "node", "drain")
IN_QUEUE, IN_COHORT, STOPPED = "InClusterQueue", "InCohortReclamation", "ClusterQueueStopped"
"""Reasons of evictions: for a higher priority, for a queue that takes its quota back, and of a stopped queue."""
LIMIT_SECONDS = 1200.0
SUBMIT_SECONDS = 40.0
"""Time over which the jobs are submitted."""
CALM_SECONDS = 2.0
"""Mean time between two disturbances."""


@dataclass
class QueueBench:
    """The control plane, its queues, and the jobs in them."""

    control_plane: ControlPlane
    kueue: Kueue
    trainers: Trainers
    namespace: str
    rng: random.Random
    spot_nodes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def prepare(self) -> None:
        """Create nodes, flavors, queues and priorities."""
        self.add_spot_nodes(len(QUEUES) * SPOT_CPUS // NODE_CPUS)
        others = len(QUEUES) * OTHER_CPUS // NODE_CPUS
        self.control_plane.add_nodes(others, prefix="other", cpu=str(NODE_CPUS), labels={"pool": "other"})
        toleration = {"key": "spot", "operator": "Exists", "effect": "NoSchedule"}
        self.kueue.apply("resourceflavors", "spot", {"nodeLabels": {"pool": "spot"}, "tolerations": [toleration]})
        self.kueue.apply("resourceflavors", "other", {"nodeLabels": {"pool": "other"}})
        for value, name in enumerate(("low", "normal", "high")):
            self.kueue.apply("workloadpriorityclasses", name, {"value": 100 * value})
        for queue in QUEUES:
            self.set_quota(queue, 1.0)

    def add_spot_nodes(self, count: int) -> None:
        """Add tainted spot nodes: only pods with the toleration of the flavor run there."""
        taint = {"key": "spot", "value": "true", "effect": "NoSchedule"}
        self.spot_nodes += self.control_plane.add_nodes(
            count, prefix="spot", cpu=str(NODE_CPUS), labels={"pool": "spot"}, taints=[taint]
        )

    def set_quota(self, queue: str, share: float, **spec: Any) -> None:
        """Set the nominal quota of a queue, as a share of the normal one."""
        flavors = [
            {"name": "spot", "cpu": int(SPOT_CPUS * share), "memory": "1Ti"},
            {"name": "other", "cpu": int(OTHER_CPUS * share), "memory": "1Ti"},
        ]
        self.kueue.add_queue(queue, self.namespace, flavors, cohort="all", preemption=PREEMPTION, **spec)

    def count(self, what: str) -> None:
        """Count a disturbance."""
        self.counts[what] = self.counts.get(what, 0) + 1


async def submit(bench: QueueBench, num_jobs: int) -> None:
    """Submit the jobs one after the other: of different sizes, lengths, queues and priorities."""
    for number in range(num_jobs):
        await asyncio.sleep(bench.rng.expovariate(num_jobs / SUBMIT_SECONDS))
        size, steps = bench.rng.choice((1, 2, 2, 3)), bench.rng.randint(40, 160)
        priority = bench.rng.choices(("low", "normal", "high"), (5, 3, 2))[0]
        annotations = {"testbed/stop-seconds": "30", "testbed/exit-code": str(int(ExitCode.SAVED))}
        job = build_job(
            f"job-{number:03}",
            nodes=size,
            training={"method": "LoRA", "steps": steps},
            queueName=bench.rng.choices(QUEUES, (5, 3, 2))[0],
            podTemplate={"metadata": {"annotations": annotations}},
        )
        job["metadata"]["labels"] = {kueue.PRIORITY_CLASS_LABEL: priority}
        bench.trainers.jobs[job["metadata"]["name"]] = TrainedJob(job["metadata"]["name"], size, steps)
        await asyncio.to_thread(bench.control_plane.api.create, JOBS.path(bench.namespace), job)


async def disturb(bench: QueueBench) -> None:
    """Disturb the jobs until cancelled; each disturbance ends after some seconds."""
    while True:
        await asyncio.sleep(bench.rng.expovariate(1 / CALM_SECONDS))
        queue = bench.rng.choice(QUEUES)
        kind = bench.rng.choice(DISTURBANCES)
        bench.count(kind)
        seconds = bench.rng.uniform(3, 6)
        if kind == "shrink":
            await asyncio.to_thread(bench.set_quota, queue, 0.25)
            await asyncio.sleep(seconds)
            await asyncio.to_thread(bench.set_quota, queue, 1.0)
        elif kind == "drain":
            await asyncio.to_thread(bench.set_quota, queue, 1.0, stopPolicy="HoldAndDrain")
            await asyncio.sleep(seconds)
            await asyncio.to_thread(bench.set_quota, queue, 1.0, stopPolicy="None")
        else:
            node = bench.spot_nodes.pop(bench.rng.randrange(len(bench.spot_nodes)))
            await asyncio.to_thread(bench.control_plane.delete_nodes, [node])
            await asyncio.sleep(seconds / 2)
            await asyncio.to_thread(bench.add_spot_nodes, 1)


async def measure(bench: QueueBench, report: OperatorBench, num_jobs: int) -> dict[str, object]:
    """Run all jobs to their end under disturbances, and return the content of the last line."""
    started = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(bench.trainers.run())
        submitting = tasks.create_task(submit(bench, num_jobs))
        disturbing = tasks.create_task(disturb(bench))
        states: list[str] = []
        while time.monotonic() - started < LIMIT_SECONDS:
            await asyncio.sleep(5.0)
            states = await _phases(report.api, bench.namespace) or states
            shown = ", ".join(f"{states.count(phase)} {phase}" for phase in sorted(set(states)))
            report.print_status(f"{shown}; {sum(job.num_evictions for job in bench.trainers.jobs.values())} evictions")
            if submitting.done() and states.count("Succeeded") >= 0.9 * num_jobs and not disturbing.done():
                # The last jobs end without disturbances, so that the benchmark ends.
                disturbing.cancel()
                await asyncio.to_thread(_restore, bench)
            if submitting.done() and all(state in ("Succeeded", "Failed") for state in states):
                break
        # The last events are still on their way.
        await asyncio.sleep(2.0)
        for task in (following, submitting, disturbing):
            task.cancel()
    jobs, trace = bench.trainers.jobs.values(), bench.trainers.trace
    evictions = sum(job.num_evictions for job in jobs)
    report.add_row("jobs", f"{len(jobs)}, all ended after {time.monotonic() - started:.0f} s")
    report.add_row("disturbances", ", ".join(f"{number} {what}" for what, number in sorted(bench.counts.items())))
    report.add_row("pods", f"{len(trace.created)} created")
    report.add_row("evictions", ", ".join(f"{number} {why}" for why, number in trace.evictions.most_common()))
    most = ", ".join(f"{trace.most[queue]} in {queue}" for queue in QUEUES)
    report.add_row("most admitted pods", f"{most}; {SPOT_CPUS + OTHER_CPUS} without borrowing")
    report.add_row("released quota", f"{evictions}, {sum(job.num_saved for job in jobs)} after a save of the last step")
    finished = sum(job.saved == job.total_steps for job in jobs)
    return {
        "jobs": len(jobs),
        "unadmitted_pods": trace.num_unadmitted(),
        "lost": num_jobs - min(finished, states.count("Succeeded")),
        "saved_before_yield_share": round(sum(job.num_saved for job in jobs) / evictions, 4) if evictions else None,
        "evictions": evictions,
        "borrowing": trace.num_borrowing,
        "preempted": trace.evictions[IN_QUEUE],
        "reclaimed": trace.evictions[IN_COHORT],
        "vanished_nodes": bench.counts.get("node", 0),
        "shrunk_quotas": bench.counts.get("shrink", 0),
        "drained_queues": bench.counts.get("drain", 0),
        "missing": _missing(bench),
        "seconds": round(time.monotonic() - started, 1),
    }


def _missing(bench: QueueBench) -> list[str]:
    """Return what did not happen: the benchmark would say less than it seems to."""
    trace = bench.trainers.trace
    happened = {
        "borrowing": trace.num_borrowing,
        **{f"eviction {why}": trace.evictions[why] for why in (IN_QUEUE, IN_COHORT, STOPPED)},
        **{kind: bench.counts.get(kind, 0) for kind in DISTURBANCES},
    }
    return [what for what, number in happened.items() if not number]


def _restore(bench: QueueBench) -> None:
    for queue in QUEUES:
        bench.set_quota(queue, 1.0, stopPolicy="None")
    bench.add_spot_nodes(len(QUEUES) * SPOT_CPUS // NODE_CPUS - len(bench.spot_nodes))


async def _phases(api: KubeApi, namespace: str) -> list[str]:
    """Return the phases of all jobs; an empty list if the API server does not answer now."""
    try:
        items = (await api.get(JOBS.path(namespace)))["items"]
    except ApiError as error:
        if error.transient:
            return []
        raise
    return [(item.get("status") or {}).get("phase") or "Pending" for item in items]


async def run(num_jobs: int, seed: int) -> tuple[OperatorBench, dict[str, object]]:
    """Start everything, run the jobs, and return the rows and the content of the last line."""
    with ControlPlane() as control_plane, Kueue(control_plane) as controller:
        install(control_plane, queues=True)
        namespace = control_plane.create_namespace("queues")
        client = await connect(control_plane.kubeconfig, num_connections=32)
        api = KubeApi(client, ServerClock())
        report = OperatorBench(control_plane, api, num_jobs, 0)
        bench = QueueBench(
            control_plane,
            controller,
            Trainers(api, namespace, WORKLOADS, SPOT_CPUS + OTHER_CPUS),
            namespace,
            random.Random(seed),
        )
        flags = ("--kueue=true", "--lease-seconds=15")
        operator = OperatorProcess(
            control_plane.kubeconfig_for(ACCOUNT, HOME, 7200), control_plane.folder / "operator.log", flags
        )
        try:
            bench.prepare()
            with running(operator):
                return report, await measure(bench, report, num_jobs)
        except BaseException:
            if operator.log.exists():
                print("\n".join(operator.log.read_text().splitlines()[-LOG_LINES:]))
            raise
        finally:
            await client.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the benchmark."""
    command_line = argparse.ArgumentParser(prog="python -m bench.queue", description=__doc__)
    command_line.add_argument("--jobs", type=int, default=200, help="number of FineTuneJobs (default: 200)")
    command_line.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    options = command_line.parse_args(arguments)
    report, result = asyncio.run(run(options.jobs, options.seed))
    finish(("measurement", "value"), report.rows, result)
    sys.exit(1 if result["missing"] else 0)


if __name__ == "__main__":
    main()
