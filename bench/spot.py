"""Compare the goodput on spot capacity of no operator, upstream practice and this operator, on the same traces.

The real core runs in the simulated cluster. Nodes are interrupted and replaced according to a trace. Everything that
does not depend on the practice (nodes, images, loading, duration of a step and of a save) is the same for all three.

- none: saves nothing; an interrupted run starts from the beginning.
- upstream: a checkpoint every 500 steps (the default of the diffusers scripts), SIGTERM ends the ranks, and the
  complete gang restarts. Pods are deleted and created again at once: back-off and hung survivors are not counted
  against it.
- ours: asynchronous checkpoints at the interval that `auto` finds. All ranks save on a preemption notice. Survivors
  make an emergency save when a peer fails suddenly. Survivors keep their pods and continue with fewer nodes after
  `shrinkAfter`, until the replacement is a ready standby.

Goodput is the time of the steps that contribute to the final model, at full speed, divided by the duration of the job.

Sources of the figures:

- Interruptions: EC2's Spot Instance Advisor publishes the share of instances interrupted in a month by instance type,
  in bands from below 5 % to above 20 % (https://aws.amazon.com/ec2/spot/instance-advisor). GPU capacity is interrupted
  in bursts. The traces published with J. Thorpe et al., "Bamboo: Making Preemptible Instances Resilient for Affordable
  Training of Large DNNs" (NSDI 2023; doc/data of https://github.com/uclasystem/bamboo) contain 3 losses in 190 node
  hours of p2.xlarge (us-east-1e: 1.6 % an hour) and 85 in 200 node hours of g4dn.xlarge (us-east-1c: 43 % an hour). 10,
  16 and 33 % an hour are assumed, as points between these. A trace is a Poisson process with such a rate for each node.
  This assumption is a disadvantage for all three: in reality, several nodes lost in one burst cost only one restart.
- Preemption notice: two minutes on EC2
  (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html). A tenth of the
  interruptions of a generated trace come without a notice, as after a hardware failure or a missed notice. This
  assumption costs the upstream practice nothing.
- A replacement is requested when the preemption notice is given, and its node is ready after 60 s: an assumption that
  favours all three equally. A GPU image of several gigabytes is pulled and unpacked in 150 s on a new node (8 GB at
  55 MB/s); nodes keep it.
- Steps: ControlNet on SDXL, 190k images x 20 epochs in 3,306 min on 8 A100 (field reports) is 19 images a second: 1.7 s
  for a global batch of 32.
- Loading takes 60 s in a new pod (several gigabytes of weights from a shared file system, and the libraries) and 12 s
  in a kept pod or a standby (libraries are imported, files are in the page cache). A save takes 3 s. Ours stalls the
  steps for 0.3 s (it copies the state and writes in the background), upstream's for all 3 s. These are assumptions;
  each is a flag.

A CSV has the columns seconds, node and notice_seconds. The last line is JSON: the goodput of each practice in the
headline scenario, or in that of the CSV.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

from finetune_contract.interval import auto_seconds, estimate_mtbf_seconds
from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.types import ObservedPod
from testing.measure.report import finish
from testing.simulated.cluster import SIMULATED, SimulatedCluster
from testing.simulated.model import Workload

HOURS_PER_MONTH = 730.0
SCENARIOS = (
    ("Advisor, 20 % a month", 0.20 / HOURS_PER_MONTH),
    ("10 % an hour", 0.10),
    ("16 % an hour", 0.16),
    ("33 % an hour", 0.33),
)
"""Name, and the share of the nodes that is interrupted per hour. See the module's docstring for the sources."""
HEADLINE = 2
"""Index of the scenario in the JSON. The goodput of upstream practice is below 0.85 there."""
NOTICE_SECONDS = 120.0
SUDDEN_SHARE = 0.1
HORIZON_FACTOR = 2.0
"""A job is stopped after this multiple of the duration of an undisturbed job."""


@dataclass(frozen=True)
class SpotParameters:
    """Parameters that are the same for all practices."""

    num_nodes: int
    hours: float
    step_seconds: float
    save_seconds: float
    stall_seconds: float
    load_seconds: float
    warm_load_seconds: float
    pull_seconds: float
    provision_seconds: float

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the job."""
        return int(self.hours * 3600 / self.step_seconds)


@dataclass(frozen=True)
class Interruption:
    """The interruption of one node."""

    seconds: float
    node: int
    """Index of the node among the existing nodes, ordered by age."""
    notice_seconds: float


@dataclass(frozen=True)
class Practice:
    """A way to run a job. If `save_steps` is None, `auto` chooses the interval."""

    name: str
    save_steps: int | None
    is_ours: bool


@dataclass(frozen=True)
class SpotResult:
    """Measurements of one simulated job."""

    goodput: float
    lost_steps: int
    node_hours: float
    attempts: int


PRACTICES = (
    Practice("none", 10**9, is_ours=False),
    Practice("upstream", 500, is_ours=False),
    Practice("ours", None, is_ours=True),
)


class IgnoringWatchdog:
    """A watchdog that checks nothing."""

    def status_written(self, job: FineTuneJob, new: FineTuneJobStatus) -> None:
        """Ignore the call."""

    def pod_created(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """Ignore the call."""

    def pod_deleted(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """Ignore the call."""

    def pod_resized(self, job: FineTuneJob, pod: ObservedPod, memory: str) -> None:
        """Ignore the call."""

    def quota_released(self, job_name: str) -> None:
        """Ignore the call."""

    def committed(self, job_name: str, attempt: int, step: int) -> None:
        """Ignore the call."""


def make_trace(rate_per_hour: float, num_nodes: int, seconds: float, seed: int) -> list[Interruption]:
    """Return interruptions as a Poisson process: each node is interrupted at this rate, independent of its age."""
    rng = random.Random(seed)
    trace, now = [], 0.0
    while (now := now + rng.expovariate(rate_per_hour * num_nodes / 3600)) < seconds:
        notice = 0.0 if rng.random() < SUDDEN_SHARE else NOTICE_SECONDS
        trace.append(Interruption(now, rng.randrange(num_nodes), notice))
    return trace


def read_trace(path: Path) -> list[Interruption]:
    """Read a trace from a CSV with the columns seconds, node and notice_seconds."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Interruption(float(row["seconds"]), int(row["node"]), float(row["notice_seconds"]))
            for row in csv.DictReader(file)
        ]


def run(practice: Practice, trace: Sequence[Interruption], parameters: SpotParameters) -> SpotResult:
    """Run one job through a trace."""
    # Gangs are off by default; the other practices have no gang either.
    settings = replace(SIMULATED, gangs=False)
    if not practice.is_ours:
        settings = replace(settings, hold_seconds=0)
    cluster = SimulatedCluster("spot", IgnoringWatchdog(), parameters.num_nodes, settings)
    cluster.kubelets.pull_seconds, cluster.kubelets.cached_seconds = parameters.pull_seconds, 2.0
    work = _workload(practice, trace, parameters)
    topology: dict[str, object] = {"accelerator": "cpu", "nodes": parameters.num_nodes}
    recovery: dict[str, object] = {"noticeSeconds": int(NOTICE_SECONDS), "maxFailures": 1000}
    if practice.is_ours and parameters.num_nodes > 1:
        topology = {
            "accelerator": "cpu",
            "minNodes": max(1, parameters.num_nodes // 2),
            "maxNodes": parameters.num_nodes,
        }
        recovery["shrinkAfter"] = "5s"
    cluster.make_job("job", work, topology=topology, recovery=recovery)
    hours = _NodeHours(cluster)
    for interruption in trace:
        cluster.engine.after(interruption.seconds, partial(_interrupt, cluster, interruption, parameters, hours))
    ideal = work.total_steps * work.step_seconds
    finished = (Phase.SUCCEEDED, Phase.FAILED)
    cluster.engine.run(HORIZON_FACTOR * ideal, stop=lambda: cluster.server.jobs["job"].status.phase in finished)
    status = cluster.server.jobs["job"].status
    kept = work.total_steps if status.phase is Phase.SUCCEEDED else 0
    trained = cluster.server.storage["job"].num_trained
    return SpotResult(
        goodput=kept * work.step_seconds / cluster.engine.time,
        lost_steps=trained - kept,
        node_hours=hours.total(),
        attempts=status.attempt,
    )


def _workload(practice: Practice, trace: Sequence[Interruption], parameters: SpotParameters) -> Workload:
    save_steps = practice.save_steps
    if save_steps is None:
        # The interval at the middle of the run, from the interruptions until then. Those with a preemption notice do
        # not count, because all ranks save before them anyway.
        half = parameters.hours * 1800
        mtbf = estimate_mtbf_seconds(half, sum(item.seconds < half and not item.notice_seconds for item in trace))
        save_steps = max(1, round(auto_seconds(parameters.stall_seconds, mtbf) / parameters.step_seconds))
    return Workload(
        total_steps=parameters.total_steps,
        step_seconds=parameters.step_seconds,
        save_steps=min(save_steps, parameters.total_steps),
        save_seconds=parameters.save_seconds,
        stall_seconds=parameters.stall_seconds if practice.is_ours else None,
        load_seconds=parameters.load_seconds,
        warm_load_seconds=parameters.warm_load_seconds,
        restore_seconds=3.0,
        full_size=parameters.num_nodes,
        saves_on_notice=practice.is_ours,
        emergency_saves=practice.is_ours,
    )


class _NodeHours:
    """Counts the node hours that are paid for: the time of all existing nodes."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._since = 0.0
        self._seconds = 0.0

    def note(self) -> None:
        """Add the time since the last call. Call it before the number of nodes changes."""
        now = self._cluster.engine.time
        self._seconds += (now - self._since) * sum(node.up for node in self._cluster.server.nodes.values())
        self._since = now

    def total(self) -> float:
        """Return the node hours so far."""
        self.note()
        return self._seconds / 3600


def _interrupt(
    cluster: SimulatedCluster, interruption: Interruption, parameters: SpotParameters, hours: _NodeHours
) -> None:
    nodes = [node for node in cluster.server.nodes.values() if node.up and not node.leaving]
    if not nodes:
        return
    hours.note()
    node = nodes[interruption.node % len(nodes)]
    if interruption.notice_seconds > 0:
        cluster.kubelets.preempt(node, interruption.notice_seconds, tainted=False)
        cluster.engine.after(interruption.notice_seconds - 0.01, hours.note)
    else:
        cluster.kubelets.stop_node(node, loud=True)
    # Another machine replaces the node. It is requested at the time of the preemption notice.
    cluster.engine.after(parameters.provision_seconds, lambda: _add_node(cluster, hours))


def _add_node(cluster: SimulatedCluster, hours: _NodeHours) -> None:
    hours.note()
    cluster.kubelets.add_node()


def main() -> None:
    """Run all practices on the same traces and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=8, help="nodes of the job (default 8)")
    parser.add_argument("--hours", type=float, default=6.0, help="length of the undisturbed run (default 6)")
    parser.add_argument("--step-seconds", type=float, default=1.7, help="duration of a step on all nodes (default 1.7)")
    parser.add_argument("--save-seconds", type=float, default=3.0, help="duration of a save (default 3)")
    parser.add_argument("--stall-seconds", type=float, default=0.3, help="how long our save stalls the steps (0.3)")
    parser.add_argument(
        "--load-seconds", type=float, default=60.0, help="duration of loading in a new pod (default 60)"
    )
    parser.add_argument(
        "--warm-load-seconds", type=float, default=12.0, help="duration of loading in a kept pod (default 12)"
    )
    parser.add_argument(
        "--pull-seconds", type=float, default=150.0, help="duration of an image pull on a new node (150)"
    )
    parser.add_argument(
        "--provision-seconds", type=float, default=60.0, help="time until a replacement node is ready (60)"
    )
    parser.add_argument("--price", type=float, default=1.0, help="price of a node hour (default 1)")
    parser.add_argument("--trace", type=Path, default=None, help="CSV with the columns seconds, node, notice_seconds")
    parser.add_argument("--seeds", type=int, default=2, help="generated traces of each rate (default 2)")
    parser.add_argument("--scenario", type=int, default=None, help="run only the scenario with this index, from 0")
    args = parser.parse_args()
    parameters = SpotParameters(
        args.nodes,
        args.hours,
        args.step_seconds,
        args.save_seconds,
        args.stall_seconds,
        args.load_seconds,
        args.warm_load_seconds,
        args.pull_seconds,
        args.provision_seconds,
    )
    rows: list[list[object]] = [["parameter", name, value, "", "", "", ""] for name, value in vars(parameters).items()]
    undisturbed = run(PRACTICES[-1], [], parameters).goodput
    rows.append(["no interruption", "ours", round(undisturbed, 3), 1.0, 0, 1, ""])
    results = []
    for name, traces in _scenarios(args, parameters):
        result = {}
        for practice in PRACTICES:
            measured = [run(practice, trace, parameters) for trace in traces]
            goodput = round(mean(one.goodput for one in measured), 3)
            lost = round(mean(one.lost_steps for one in measured))
            attempts = round(mean(one.attempts for one in measured))
            node_hours = mean(one.node_hours for one in measured)
            share = round(goodput / undisturbed, 3)
            rows.append([name, practice.name, goodput, share, lost, attempts, round(node_hours * args.price, 1)])
            result[practice.name] = goodput
            print(f"  {name}: {practice.name}: goodput {goodput}", flush=True)
        results.append(result)
    finish(
        ["scenario", "practice", "goodput", "of undisturbed", "repeated steps", "attempts", "cost"],
        rows,
        results[min(HEADLINE, len(results) - 1)],
    )


def _scenarios(args: argparse.Namespace, parameters: SpotParameters) -> list[tuple[str, list[list[Interruption]]]]:
    """Return the name and the traces of each scenario."""
    if args.trace is not None:
        return [(args.trace.name, [read_trace(args.trace)])]
    seconds = HORIZON_FACTOR * parameters.hours * 3600
    chosen = SCENARIOS if args.scenario is None else (SCENARIOS[args.scenario],)
    return [
        (name, [make_trace(rate, parameters.num_nodes, seconds, seed) for seed in range(args.seeds)])
        for name, rate in chosen
    ]


if __name__ == "__main__":
    main()
